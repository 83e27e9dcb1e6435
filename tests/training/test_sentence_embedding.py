"""Sentence embeddings: the loss over ranks is that of one process, and texts that belong together are found."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from launcher.data.loader import without_targets
from launcher.errors import SourceError
from launcher.run_directory import read_json_lines
from launcher.tasks import make_task
from launcher.tasks.sentence_embedding import contrastive_loss
from tests.support.ranks import Ranks
from tests.training.task_runs import BERT, run_of, write_recipe
from tests.training.test_text_tasks import functions


def rows_of(negatives: bool = False) -> list[dict[str, str]]:
    """A function's head and its docstring; perhaps that of another function."""
    found = functions()
    rows = [{"anchor": one["head"], "positive": one["doc"].splitlines()[0]} for one in found]
    if negatives:
        for row, other in zip(rows, rows[7:] + rows[:7], strict=True):
            row["negative"] = other["positive"].upper()
    return rows


def make(folder: Path, *overrides: str, rows: Any = None, workers: int = 2, **sections: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (rows_of() if rows is None else rows)))
    recipe = write_recipe(
        folder, "sentence_embedding", f"{{config: {BERT}}}", [{"type": "jsonl", "files": [str(file)]}],
        **{"data": {"sequence_length": 32}, "tokenizer": {"train": {"vocab_size": 500}}, **sections},
    )  # fmt: skip
    return run_of(recipe, folder / f"run-{workers}", *overrides, workers=workers)


def plain_loss(anchors: torch.Tensor, candidates: list[torch.Tensor], temperature: float) -> torch.Tensor:
    """By PyTorch, on all samples at once: mean over anchors."""
    logits = anchors @ torch.cat(candidates).T / temperature
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(anchors)))


@pytest.mark.distributed
@pytest.mark.parametrize("kinds", [1, 2])
def test_the_loss_over_ranks_is_that_of_one_process(two_ranks: Ranks, kinds: int) -> None:
    """A sample that only fills up a batch is neither an anchor nor a candidate."""
    generator = torch.Generator().manual_seed(kinds)
    places = torch.randn(1 + kinds, 10, 6, generator=generator)
    counted = torch.ones(10, dtype=torch.bool)
    counted[7] = False
    whole = places.clone().requires_grad_()
    anchors, *candidates = torch.nn.functional.normalize(whole[:, counted], dim=-1)
    expected = plain_loss(anchors, list(candidates), 0.1)
    expected.backward()
    answers = two_ranks.call(
        "task_cases:contrastive", places=places.tolist(), counted=counted.tolist(), temperature=0.1
    )
    assert sum(answer["loss"] for answer in answers) / 9 == pytest.approx(expected.item(), abs=1e-5)
    gradient = np.concatenate([answer["gradient"] for answer in answers], axis=1) / 9
    np.testing.assert_allclose(gradient, whole.grad.numpy(), atol=1e-5)
    alone = contrastive_loss(anchors, list(candidates), torch.ones(9, dtype=torch.bool), 0.1)
    assert alone.item() / 9 == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("negatives", [False, True])
def test_the_loss_is_that_of_plain_pytorch(tmp_path: Path, negatives: bool) -> None:
    _, plan, prepared = make(tmp_path, rows=rows_of(negatives), workers=1)
    task = make_task(plan, prepared.facts)
    model = task.build_model().eval()
    (dataset,) = prepared.split("train")
    samples = [dataset[index] for index in range(6)]
    output = task.loss(model, task.collate(samples))
    places = [
        torch.cat([mean_of_tokens(model, sample[f"{side}_ids"]) for sample in samples])
        for side in ("anchor", "positive", "negative")[: 2 + negatives]
    ]
    expected = plain_loss(places[0], places[1:], 0.05)
    assert output.loss_sum.item() / 6 == pytest.approx(expected.item(), abs=1e-5)
    filled = task.loss(model, task.collate([*samples, without_targets(dataset[7])]))
    assert (int(filled.num_targets), task.num_targets(task.collate(samples))) == (6, 6)
    assert filled.loss_sum.item() == pytest.approx(output.loss_sum.item(), abs=1e-4)


def mean_of_tokens(model: Any, ids: Any) -> torch.Tensor:
    states = model(input_ids=torch.from_numpy(ids.astype("int64"))[None]).last_hidden_state
    return torch.nn.functional.normalize(states.mean(dim=1), dim=-1)


@pytest.mark.distributed
def test_training_is_the_same_on_one_worker_and_on_two(tmp_path: Path, one_rank: Ranks, two_ranks: Ranks) -> None:
    found = []
    for ranks, workers, micro in ((one_rank, 1, 8), (two_ranks, 2, 4)):
        directory, _, prepared = make(
            tmp_path, "training.max_steps=4", f"training.micro_batch_size={micro}", "training.learning_rate=1.0e-3",
            "evaluation.max_eval_samples=8", workers=workers,
        )  # fmt: skip
        ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        records = [record for record in read_json_lines(directory.metrics) if "grad_norm" in record]
        found.append([value for record in records for value in (record["loss"], record["grad_norm"])])
    assert len(found[0]) == 8
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.matrix
@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["2", "3"])
def test_two_workers_learn_which_texts_belong_together(tmp_path: Path, two_ranks: Ranks, stage: str) -> None:
    directory, _, prepared = make(
        tmp_path, "training.max_steps=30", "training.micro_batch_size=16", "training.learning_rate=3.0e-3",
        "evaluation.eval_steps=10", "evaluation.max_eval_samples=101", "logging.logging_steps=20",
        f"zero.stage={stage}",
    )  # fmt: skip
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    records = [record for record in read_json_lines(directory.metrics) if "eval_mean_reciprocal_rank" in record]
    assert records[-1]["eval_mean_reciprocal_rank"] > 0.65, "random weights have 0.55: names are in both texts"
    assert records[-1]["eval_recall_at_5"] > 0.5, "chance is 0.05"


def test_empty_texts_are_counted(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="1 of 41 examples cannot be used: 1 x its anchor or positive is empty"):
        make(tmp_path, rows=[*rows_of()[:40], {"anchor": " ", "positive": "x"}])


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(SourceError, match="the tokenizer has no padding token"):
        make(tmp_path, tokenizer={"tokenizer_name_or_path": str(folder), "train": None})
