"""Distillation: the loss is what NumPy computes, and a student comes nearer to its teacher."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertForSequenceClassification

from launcher.errors import ModelError
from launcher.tasks import make_task
from tests.support.ranks import Ranks
from tests.training.task_runs import BERT, STDLIB, run_of, write_recipe

SOURCE = {"type": "text", "files": [f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py"]}
STUDENT = (
    "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "max_position_embeddings: 64, vocab_size: %d}"
)


def make_lm(folder: Path, teacher: Path, *overrides: str, vocabulary: int = 320) -> Any:
    recipe = write_recipe(
        folder, "causal_lm", f"{{config: {STUDENT % vocabulary}}}", [SOURCE], data={"sequence_length": 32},
        tokenizer={"tokenizer_name_or_path": str(teacher)},
        distillation={"teacher_name_or_path": str(teacher), "temperature": 3.0, "weight": 0.7},
    )  # fmt: skip
    return run_of(recipe, folder / "run", *overrides)


def by_numpy(student: Any, teacher: Any, labels: Any, temperature: float, weight: float) -> float:
    def log_softmax(values: Any) -> Any:
        shifted = values - values.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))

    student, teacher = (np.asarray(values, np.float64) for values in (student, teacher))
    own, other = log_softmax(student / temperature), log_softmax(teacher / temperature)
    counted = labels != -100
    soft = ((np.exp(other) * (other - own)).sum(-1) * counted).sum() * temperature**2
    hard = -np.take_along_axis(log_softmax(student), np.where(counted, labels, 0)[..., None], -1)[..., 0]
    return float((1 - weight) * (hard * counted).sum() + weight * soft)


def test_the_loss_of_a_language_model_is_that_of_numpy(tmp_path: Path, model_folder: Path) -> None:
    _, plan, prepared = make_lm(tmp_path, model_folder)
    task = make_task(plan, prepared.facts)
    model = task.build_model().train()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(4)])
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(model_folder)(**inputs).logits
        expected = by_numpy(model(**inputs).logits, theirs, batch["labels"].numpy(), 3.0, 0.7)
        output = task.loss(model, batch)
    assert output.loss_sum.item() / task.num_targets(batch) == pytest.approx(
        expected / task.num_targets(batch), abs=1e-5
    )
    model.eval()
    with torch.no_grad():
        plain = task.loss(model, batch).loss_sum.item()
        expected = by_numpy(model(**inputs).logits, theirs, batch["labels"].numpy(), 3.0, 0.0)
    assert plain == pytest.approx(expected, rel=1e-5), "an evaluation does not ask the teacher"


def classifier(folder: Path, teacher: Path, **sections: Any) -> Any:
    rows = [{"text": f"a text about {word} {i}", "label": word} for i in range(20) for word in ("cats", "dogs")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        folder, "sequence_classification", f"{{config: {BERT}}}",
        [{"type": "jsonl", "files": [str(folder / "rows.jsonl")]}], data={"sequence_length": 32},
        tokenizer={"train": {"vocab_size": 300}},
        distillation={"teacher_name_or_path": str(teacher), "temperature": 2.0, "weight": 0.25}, **sections,
    )  # fmt: skip
    return run_of(recipe, folder / "run")


def save_teacher(folder: Path, labels: list[str]) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    return folder / "teacher"


def test_the_loss_of_a_classifier_is_that_of_numpy(tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path, ["cats", "dogs"])
    _, plan, prepared = classifier(tmp_path, teacher)
    task = make_task(plan, prepared.facts)
    model = task.build_model().train()
    (dataset,) = prepared.split("train")
    batch = task.collate([dataset[index] for index in range(6)])
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    with torch.no_grad():
        theirs = BertForSequenceClassification.from_pretrained(teacher).eval()(**inputs).logits
        expected = by_numpy(model(**inputs).logits, theirs, batch["labels"].numpy(), 2.0, 0.25)
        assert task.loss(model, batch).loss_sum.item() / 6 == pytest.approx(expected / 6, abs=1e-5)


@pytest.mark.parametrize(
    ("labels", "text"),
    [(["dogs", "cats"], "the teacher's classes are dogs, cats"), (["a", "b", "c"], "has 3 classes, the student 2")],
)
def test_a_teacher_of_other_classes_is_refused(tmp_path: Path, labels: list[str], text: str) -> None:
    _, plan, prepared = classifier(tmp_path, save_teacher(tmp_path, labels))
    task = make_task(plan, prepared.facts)
    (dataset,) = prepared.split("train")
    with pytest.raises(ModelError, match=text):
        task.loss(task.build_model().train(), task.collate([dataset[0]]))


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path: Path, model_folder: Path) -> None:
    _, plan, prepared = make_lm(tmp_path, model_folder, vocabulary=333)
    task = make_task(plan, prepared.facts)
    (dataset,) = prepared.split("train")
    with pytest.raises(ModelError, match="has 320 tokens, the student 333"):
        task.loss(task.build_model().train(), task.collate([dataset[0]]))


@pytest.mark.distributed
def test_a_student_comes_nearer_to_its_teacher(tmp_path: Path, two_ranks: Ranks, model_folder: Path) -> None:
    directory, _, prepared = make_lm(
        tmp_path, model_folder, "training.max_steps=40", "distillation.weight=1.0", "training.micro_batch_size=8",
        "training.learning_rate=1.0e-2",
    )  # fmt: skip
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    from launcher.run_directory import read_json_lines

    losses = [record["loss"] for record in read_json_lines(directory.metrics) if "loss" in record]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
