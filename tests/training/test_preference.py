"""Preference optimisation and reward models: TRL's losses on the same batch, and pairs that teach something."""

import ast
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from launcher.data.loader import without_targets
from launcher.errors import SourceError
from launcher.run_directory import read_json_lines
from launcher.tasks import make_task
from tests.support.ranks import Ranks
from tests.training.task_runs import STDLIB, run_of, write_recipe


def pairs() -> list[dict[str, str]]:
    """A function's head, its true docstring, and that of another function."""
    found = []
    for name in ("json", "email", "asyncio"):
        for path in sorted(Path(STDLIB, name).glob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
                    found.append((f"def {node.name}():\n", doc.splitlines()[0]))
    return [
        {"prompt": head, "chosen": doc, "rejected": f"FIXME {other.lower()}"}
        for (head, doc), (_, other) in zip(found, found[7:] + found[:7], strict=True)
    ]


def make(folder: Path, model_folder: Path, *overrides: str, rows: Any = None, **sections: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (pairs() if rows is None else rows)))
    recipe = write_recipe(
        folder,
        sections.pop("task", "preference"),
        f"{{model_name_or_path: {model_folder}}}",
        [{"type": "jsonl", "files": [str(file)]}],
        **{"data": {"sequence_length": 48}, **sections},
    )
    return run_of(recipe, folder / "run", *overrides)


def prepared_batch(tmp_path: Path, model_folder: Path, count: int = 5, **sections: Any) -> Any:
    _, plan, prepared = make(tmp_path, model_folder, **sections)
    task = make_task(plan.model_copy(update={"zero_stage": 0}), prepared.facts)
    (dataset,) = prepared.split("train")
    samples = [dataset[index] for index in range(count)]
    return task, task.collate(samples), samples


def other_model(model_folder: Path) -> Any:
    """The model some way from its reference."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def trl_rows(count: int = 2) -> Any:
    return datasets.Dataset.from_list(pairs()[:count])


@pytest.mark.parametrize("method", ["dpo", "ipo"])
def test_the_loss_is_that_of_trl(tmp_path: Path, model_folder: Path, method: str) -> None:
    from trl import DPOConfig, DPOTrainer

    section = {"method": method, "beta": 0.3}
    task, batch, _ = prepared_batch(tmp_path, model_folder, preference=section)
    model = other_model(model_folder)
    trainer = DPOTrainer(
        model=model,
        ref_model=AutoModelForCausalLM.from_pretrained(model_folder),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            loss_type="sigmoid" if method == "dpo" else "ipo",
            beta=0.3,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=trl_rows(),
        processing_class=AutoTokenizer.from_pretrained(model_folder),
    )
    trainer.model.eval()
    inputs = {
        "input_ids": batch["input_ids"],
        "attention_mask": torch.ones_like(batch["input_ids"]),
        "completion_mask": (batch["labels"] != -100).long(),
    }
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, inputs)
        mine = task.loss(other_model(model_folder), batch)
    assert mine.loss_sum.item() / 5 == pytest.approx(float(expected), abs=1e-5)


def log_probabilities(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over the answers' tokens, by plain PyTorch."""
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].log_softmax(-1)
    labels = batch["labels"][:, 1:]
    each = logits.gather(2, labels.clamp(min=0)[..., None])[..., 0]
    counted = labels != -100
    return ((each * counted).sum(1) / counted.sum(1)).chunk(2)


@pytest.mark.parametrize("method", ["orpo", "simpo"])
def test_the_loss_without_a_reference_is_that_of_trl(tmp_path: Path, model_folder: Path, method: str) -> None:
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    section = {"method": method, "beta": 0.7, "gamma": 0.4}
    task, batch, samples = prepared_batch(tmp_path, model_folder, preference=section)
    model = other_model(model_folder)
    constants = SimpleNamespace(
        beta=0.7, simpo_gamma=0.4, label_smoothing=0.0, alpha=0.0, loss_type="simpo",
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    with torch.no_grad():
        mine = task.loss(model, batch).loss_sum.item() / 5
        chosen, rejected = log_probabilities(model, batch)
        if method == "simpo":
            expected = CPOTrainer.cpo_loss(constants, chosen, rejected)[0].mean()
        else:
            ratios = ORPOTrainer.odds_ratio_loss(constants, chosen, rejected)[0].mean()
            texts = [torch.from_numpy(sample["chosen_input_ids"].astype("int64"))[None] for sample in samples]
            sums = [model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1) for ids in texts]
            expected = sum(sums) / sum(ids.shape[1] - 1 for ids in texts) - ratios
    assert mine == pytest.approx(float(expected), abs=1e-5)


def test_the_reward_loss_is_that_of_trl(tmp_path: Path, model_folder: Path) -> None:
    from collections import defaultdict
    from types import SimpleNamespace

    from trl import RewardTrainer

    task, batch, samples = prepared_batch(tmp_path, model_folder, task="reward_model")
    torch.manual_seed(0)
    model = task.build_model().eval()
    same = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    constants = SimpleNamespace(
        model=model, args=SimpleNamespace(center_rewards_coefficient=None), accelerator=same,
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    with torch.no_grad():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        expected = RewardTrainer.compute_loss(constants, model, inputs)
        filled = task.collate([*samples, without_targets(samples[0])])
        mine = task.loss(model, filled)
    assert int(mine.num_targets) == task.num_targets(filled) == 5
    assert mine.loss_sum.item() / 5 == pytest.approx(float(expected), abs=1e-5)


def test_an_adapters_reference_is_the_model_without_it(tmp_path: Path, model_folder: Path) -> None:
    task, batch, samples = prepared_batch(tmp_path, model_folder, adapter={"method": "lora"})
    model = task.build_model().eval()
    with torch.no_grad():
        start = task.loss(model, batch)
        assert start.loss_sum.item() / 5 == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
        moved = task.loss(model, batch).loss_sum.item()
        task.plan = task.plan.model_copy(update={"recipe": task.plan.recipe.model_copy(update={"adapter": None})})
        assert task.loss(model, batch).loss_sum.item() == pytest.approx(moved, abs=1e-5), "a copy says the same"
        filled = task.collate([*samples, without_targets(samples[0])])
        assert task.loss(model, filled).loss_sum.item() == pytest.approx(moved, abs=1e-5)
    assert abs(moved / 5 - start.loss_sum.item() / 5) > 1e-3
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


@pytest.mark.matrix
@pytest.mark.parametrize("method", ["dpo", "ipo", "orpo", "simpo"])
def test_a_batch_of_nothing_but_fillers_counts_nothing(tmp_path: Path, model_folder: Path, method: str) -> None:
    task, _, samples = prepared_batch(tmp_path, model_folder, preference={"method": method})
    with torch.no_grad():
        output = task.loss(other_model(model_folder), task.collate([without_targets(sample) for sample in samples]))
    assert (output.loss_sum.item(), int(output.num_targets)) == (0.0, 0)


@pytest.mark.matrix
@pytest.mark.distributed
@pytest.mark.parametrize("case", ["dpo", "ipo", "orpo", "simpo", "lora", "reward_model"])
def test_two_workers_learn_which_answer_is_better(
    tmp_path: Path, two_ranks: Ranks, model_folder: Path, case: str
) -> None:
    sections: dict[str, Any] = {"preference": {"method": case, "beta": 1.0 if case in ("orpo", "simpo") else 0.3}}
    if case == "lora":
        sections = {"adapter": {"method": "lora"}}
    elif case == "reward_model":
        sections = {"task": "reward_model"}
    directory, _, prepared = make(
        tmp_path, model_folder, "training.max_steps=25", "training.micro_batch_size=8", "evaluation.eval_steps=1",
        "logging.logging_steps=10", "training.learning_rate=5.0e-3", "evaluation.max_eval_samples=49",
        "zero.stage=" + ("3" if case == "lora" else "2"), **sections,
    )  # fmt: skip
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    records = [r for r in read_json_lines(directory.metrics) if "eval_reward_accuracy" in r]
    assert records[-1]["eval_reward_accuracy"] > 0.8, "chance is 0.5"
    assert records[-1]["eval_loss"] < records[0]["eval_loss"]


def test_equal_answers_are_counted(tmp_path: Path, model_folder: Path) -> None:
    row = {"prompt": "a", "chosen": "same ", "rejected": "same"}
    with pytest.raises(SourceError, match=r"1 of 41 examples cannot be used: 1 x its two answers are the same"):
        make(tmp_path, model_folder, rows=[*pairs()[:40], row])
