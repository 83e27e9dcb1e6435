"""What a teacher says is asked once, when the data is prepared; the loss is what NumPy computes of it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertForSequenceClassification,
)

from launcher.data import derived
from launcher.data.prepare import prepare
from launcher.errors import StorageError
from launcher.recipe.loading import load_recipe
from launcher.run_directory import read_json_lines
from launcher.tasks import make_task
from launcher.tasks.soft_targets import TokenTargets
from tests.support.ranks import Ranks
from tests.training.distillation_runs import by_numpy, classifier, make_lm, save_teacher


def top_by_numpy(student: Any, teacher: Any, labels: Any, top: int, temperature: float) -> float:
    """The divergence over the most probable tokens and "any other", times the temperature squared."""

    def softmax(values: Any) -> Any:
        values = np.exp((values - values.max(-1, keepdims=True)).astype(np.float64) / temperature)
        return values / values.sum(-1, keepdims=True)

    own, other = softmax(student.numpy()), softmax(teacher.numpy())
    best = np.argsort(-other, axis=-1)[..., :top]
    p, q = np.take_along_axis(other, best, -1), np.take_along_axis(own, best, -1)
    each = (p * np.log(p / q)).sum(-1)
    rest = 1 - p.sum(-1)
    if top < other.shape[-1]:
        each = each + rest * np.log(rest / (1 - q.sum(-1)))
    return float((each * (labels != -100)).sum() * temperature**2)


@pytest.mark.parametrize("top", [1, 8, 320])
def test_the_loss_of_kept_tokens_is_that_of_numpy(tmp_path: Path, model_folder: Path, top: int) -> None:
    """With all tokens it is the live teacher's, with fewer it is smaller by what they cannot tell."""
    _, plan, prepared = make_lm(tmp_path, model_folder, precompute=True, top_k=top, weight=1.0)
    task = make_task(plan, prepared.facts)
    model = task.build_model().train()
    (dataset,) = prepared.split("train")
    assert prepared.split("validation")[0][0].keys() == {"input_ids", "labels", "position_ids"}
    batch = task.collate([dataset[index] for index in (3, 5, 8)])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    labels, targets = batch["labels"].numpy(), task.num_targets(batch)
    with torch.no_grad():
        teacher = AutoModelForCausalLM.from_pretrained(model_folder)
        own, theirs = (asked(**inputs, use_cache=False).logits for asked in (model, teacher))
        mine = task.loss(model, batch).loss_sum.item()
    whole = by_numpy(own, theirs, labels, 3.0, 1.0)
    assert mine / targets == pytest.approx(top_by_numpy(own, theirs, labels, top, 3.0) / targets, abs=1e-5)
    task.loss(model, batch).loss_sum.backward()
    assert all(values.grad.isfinite().all() for values in model.parameters() if values.grad is not None)
    if top == 320:
        assert mine / targets == pytest.approx(whole / targets, abs=1e-5)
        assert prepared.statistics["notes"] == []
    else:
        assert 0 < mine < whole
        assert f"{top} of 320 tokens are kept" in prepared.statistics["notes"][0]


def test_a_classifiers_teacher_is_asked_once(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path, ["cats", "dogs"])
    _, plan, prepared = classifier(tmp_path, teacher, {"precompute": True})
    task = make_task(plan, prepared.facts)
    model = task.build_model().train()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(6)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        theirs = BertForSequenceClassification.from_pretrained(teacher).eval()(**inputs).logits
        expected = by_numpy(model(**inputs).logits, theirs, batch["labels"].numpy(), 2.0, 0.25)
        assert task.loss(model, batch).loss_sum.item() / 6 == pytest.approx(expected / 6, abs=1e-5)
    assert task.distillation.teacher is None


def test_asking_goes_on_where_it_was_ended(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended after two parts; what is whole is not computed again, and the result is the same."""
    monkeypatch.setattr(derived, "ROWS_PER_PART", 100)
    asked: list[range] = []
    annotate = TokenTargets.annotate

    def counting(self: Any, dataset: Any, rows: range) -> Any:
        if len(asked) == 2:
            asked.append(rows)
            raise KeyboardInterrupt
        asked.append(rows)
        return annotate(self, dataset, rows)

    monkeypatch.setattr(TokenTargets, "annotate", counting)
    with pytest.raises(KeyboardInterrupt):
        make_lm(tmp_path, model_folder, precompute=True, top_k=4)
    prepared = prepare(load_recipe(tmp_path / "recipe.yaml"), progress=False)
    rows = len(prepared.split("train")[0])
    assert sorted(first.start for first in asked) == sorted([200, *range(0, rows, 100)]), "the third part alone twice"
    whole = make_lm(tmp_path / "again", model_folder, precompute=True, top_k=4)[2]
    for index in (0, 99, 100, rows - 1):
        one, other = prepared.split("train")[0][index], whole.split("train")[0][index]
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not list((tmp_path / "cache").glob("*.unfinished"))


def test_there_must_be_room(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_lm(tmp_path, model_folder)
    monkeypatch.setattr(derived.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 9, 1000))
    with pytest.raises(StorageError, match=r"what the teacher says would take about .* MiB in .* 0.0 MiB are free"):
        prepare(load_recipe(tmp_path / "recipe.yaml", ("distillation.precompute=true",)), progress=False)


@pytest.mark.distributed
def test_training_needs_no_teacher_that_was_asked_before(tmp_path: Path, two_ranks: Ranks, model_folder: Path) -> None:
    """Step by step what the live teacher gives."""
    losses = []
    for precompute in (False, True):
        teacher = tmp_path / "teacher"
        shutil.copytree(model_folder, teacher, dirs_exist_ok=True)
        directory, _, prepared = make_lm(
            tmp_path / str(precompute), teacher, "training.max_steps=4", precompute=precompute, top_k=320
        )
        if precompute:
            shutil.rmtree(teacher)
        two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
        losses.append([record["loss"] for record in read_json_lines(directory.metrics) if "loss" in record])
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
