"""Runs with a teacher, and the loss that NumPy gives them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
)

from tests.training.task_runs import BERT, STDLIB, run_of, write_recipe

SOURCE = {"type": "text", "files": [f"{STDLIB}/json/*.py"], "sample_by": "paragraph"}
STUDENT = (
    "{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, "
    "max_position_embeddings: 64, vocab_size: %d}"
)


def make_lm(folder: Path, teacher: Path, *overrides: str, vocabulary: int = 320, **section: Any) -> Any:
    folder.mkdir(exist_ok=True)
    recipe = write_recipe(
        folder, "causal_lm", f"{{config: {STUDENT % vocabulary}, attn_implementation: eager}}", [SOURCE],
        data={"sequence_length": 32}, tokenizer={"tokenizer_name_or_path": str(teacher)},
        distillation={"teacher_name_or_path": str(teacher), "temperature": 3.0, "weight": 0.7, **section},
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


def classifier(
    folder: Path, teacher: Path, section: dict[str, Any] | None = None, model_attention: str = "sdpa"
) -> Any:
    rows = [{"text": f"a text about {word} {i}", "label": word} for i in range(20) for word in ("cats", "dogs")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        folder, "sequence_classification", f"{{config: {BERT}, attn_implementation: {model_attention}}}",
        [{"type": "jsonl", "files": [str(folder / "rows.jsonl")]}], data={"sequence_length": 32},
        tokenizer={"train": {"vocab_size": 300}},
        distillation={"teacher_name_or_path": str(teacher), "temperature": 2.0, "weight": 0.25, **(section or {})},
    )  # fmt: skip
    return run_of(recipe, folder / "run")


def save_teacher(folder: Path, labels: list[str], heads: int = 2) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=heads,
        id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder / "teacher")
    return folder / "teacher"
