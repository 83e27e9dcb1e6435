"""KTO: TRL's loss on the same batch, and answers called good and bad that teach something."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.data.loader import without_targets
from launcher.errors import RecipeError, SourceError
from launcher.run_directory import read_json_lines
from launcher.tasks import make_task
from tests.support.ranks import Ranks
from tests.training.task_runs import run_of, write_recipe
from tests.training.test_preference import other_model, pairs

SECTION = {"beta": 0.3, "desirable_weight": 1.25, "undesirable_weight": 0.75}


def answers() -> list[dict[str, Any]]:
    """Each pair's answers by themselves."""
    found = []
    for row in pairs():
        found.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        found.append({"prompt": row["prompt"], "completion": row["rejected"], "label": False})
    return found


def make(folder: Path, model_folder: Path, *overrides: str, rows: Any = None, **sections: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (answers() if rows is None else rows)))
    recipe = write_recipe(
        folder, "kto", f"{{model_name_or_path: {model_folder}}}", [{"type": "jsonl", "files": [str(file)]}],
        **{"data": {"sequence_length": 48}, "kto": SECTION, **sections},
    )  # fmt: skip
    return run_of(recipe, folder / "run", *overrides)


def test_the_loss_is_that_of_trl(tmp_path: Path, model_folder: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    _, plan, prepared = make(tmp_path, model_folder)
    task = make_task(plan, prepared.facts)
    (dataset,) = prepared.split("train")
    samples = [dataset[index] for index in range(5)]
    assert {int(sample["desirable"]) for sample in samples} == {0, 1}
    batch = task.collate(samples)
    trainer = KTOTrainer(
        model=other_model(model_folder),
        ref_model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=KTOConfig(
            output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
            train_sampling_strategy="sequential", **SECTION,
        ),
        train_dataset=datasets.Dataset.from_list(answers()[:2]),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )  # fmt: skip
    trainer.model.eval()
    inputs: dict[str, Any] = {"label": batch["desirable"]}
    for theirs, ours in (("", ""), ("KL_", "other_")):
        inputs[f"{theirs}input_ids"] = batch[f"{ours}input_ids"]
        inputs[f"{theirs}attention_mask"] = torch.ones_like(batch[f"{ours}input_ids"])
        inputs[f"{theirs}completion_mask"] = (batch[f"{ours}labels"] != -100).long()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, inputs)
        mine = task.loss(other_model(model_folder), batch)
        filled = task.loss(other_model(model_folder), task.collate([*samples, without_targets(samples[0])]))
    assert mine.loss_sum.item() / 5 == pytest.approx(float(expected), abs=1e-5)
    assert (filled.loss_sum.item(), int(filled.num_targets)) == (pytest.approx(mine.loss_sum.item(), abs=1e-5), 5)


def test_each_prompt_gets_the_answer_of_the_sample_before(tmp_path: Path, model_folder: Path) -> None:
    _, plan, prepared = make(tmp_path, model_folder)
    task = make_task(plan, prepared.facts)
    (dataset,) = prepared.split("train")
    samples = [dataset[index] for index in range(3)]
    batch = task.collate([samples[0], without_targets(samples[1]), samples[2]])
    tokenizer = AutoTokenizer.from_pretrained(model_folder)

    def part(ids: Any, labels: Any, learnt: bool) -> str:
        return str(tokenizer.decode([int(i) for i, label in zip(ids, labels, strict=True) if (label >= 0) == learnt]))

    for row, other in ((0, 2), (2, 0)):
        made = batch["other_input_ids"][row], batch["other_labels"][row]
        assert part(*made, learnt=True) == part(samples[other]["input_ids"], samples[other]["labels"], learnt=True)
        prompt = part(samples[row]["input_ids"], samples[row]["labels"], learnt=False)
        assert part(*made, learnt=False).startswith(prompt)
    assert (batch["other_labels"][1] == -100).all()


@pytest.mark.matrix
@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_workers_learn_which_answers_are_good(
    tmp_path: Path, two_ranks: Ranks, model_folder: Path, stage: str
) -> None:
    directory, _, prepared = make(
        tmp_path, model_folder, "training.max_steps=25", "training.micro_batch_size=8", "evaluation.eval_steps=5",
        "logging.logging_steps=10", "training.learning_rate=5.0e-3", "evaluation.max_eval_samples=49",
        f"zero.stage={stage}", **({"adapter": {"method": "lora"}} if stage == "3" else {}),
    )  # fmt: skip
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    records = [record for record in read_json_lines(directory.metrics) if "eval_roc_auc" in record]
    assert records[-1]["eval_roc_auc"] > 0.65, "chance is 0.5"
    assert records[-1]["eval_reward_margin"] > 0
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]


def test_a_micro_batch_of_one_is_refused(tmp_path: Path, model_folder: Path) -> None:
    _, plan, prepared = make(tmp_path, model_folder, "training.micro_batch_size=1")
    with pytest.raises(RecipeError, match="estimates how far the model is from its reference"):
        make_task(plan, prepared.facts)


def test_answers_of_one_kind_and_labels_of_none_are_refused(tmp_path: Path, model_folder: Path) -> None:
    rows = answers()[:40]
    with pytest.raises(SourceError, match="every label says True: KTO learns from good answers and from bad ones"):
        make(tmp_path, model_folder, rows=[row for row in rows if row["label"]])
    labelled = [{**row, "label": str(row["label"])} for row in rows]
    with pytest.raises(SourceError, match="1 of 41 examples cannot be used: 1 x its label is neither true nor false"):
        make(tmp_path, model_folder, rows=[*labelled, {**labelled[0], "label": "perhaps"}])
