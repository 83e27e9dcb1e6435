"""Sequence classification: a class, several classes or a number for a text or a pair of texts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launcher.data.derived import Annotations, Derivation
from launcher.data.examples import BadExample, EncodingError, Example, Field, Row
from launcher.data.store import PreparedData
from launcher.planning.alone import plan_alone
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.tasks.asking import samples_at_once
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.classification import (
    Labels,
    class_weights,
    classification_answers,
    classification_loss,
    classification_metrics,
    is_counted,
    shown_answers,
)
from launcher.tasks.distillation import Distillation, with_projections
from launcher.tasks.padding import pad, padding_token
from launcher.tasks.soft_targets import ClassTargets, collate_known

HF_PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}


class SequenceClassificationEncoder:
    """Rows with `text`, perhaps `text_pair`, and `label`."""

    roles: tuple[str, ...] = ("text", "label")
    optional_roles: tuple[str, ...] = ("text_pair",)

    def __init__(self, recipe: Recipe) -> None:
        self.section = recipe.classification
        self.max_length = recipe.data.sequence_length
        self.labels = Labels(recipe.classification)
        self.tokenizer: Any = None

    def identity(self) -> Any:
        """Settings of the labels."""
        return [self.section.problem_type, list(self.section.labels)]

    def texts(self, row: Row) -> list[str]:
        """Both texts."""
        return [str(row["text"] or ""), str(row["text_pair"] or "")] if "text_pair" in row else [str(row["text"] or "")]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Learn the labels."""
        self.tokenizer = tokenizer
        padding_token(tokenizer)
        self.labels.learn(row["label"] for rows in training_rows for row in rows)

    def fields(self) -> dict[str, Field]:
        """Tokens, which text each is of, and the target."""
        return {"input_ids": Field("uint32"), "token_type_ids": Field("uint8"), "labels": self.labels.field()}

    def encode(self, rows: Sequence[Row]) -> list[Example | BadExample]:
        """Tokenise; the longer text of a pair is cut first."""
        pairs = [str(row["text_pair"] or "") for row in rows] if rows and "text_pair" in rows[0] else None
        encoded = self.tokenizer(
            [str(row["text"] or "") for row in rows],
            pairs,
            truncation=True,
            max_length=self.max_length,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        return [
            self._example(row, encoded["input_ids"][index], encoded["token_type_ids"][index])
            for index, row in enumerate(rows)
        ]

    def _example(self, row: Row, input_ids: list[int], token_type_ids: list[int]) -> Example | BadExample:
        if not any(text.strip() for text in self.texts(row)):
            return BadExample("its text is empty")
        if not input_ids:
            raise EncodingError("the tokenizer makes no token of a text that is not empty")
        target = self.labels.encode(row["label"])
        if isinstance(target, str):
            return BadExample(target)
        return {
            "input_ids": np.array(input_ids, np.uint32),
            "token_type_ids": np.array(token_type_ids, np.uint8),
            "labels": target,
        }

    def facts(self) -> dict[str, Any]:
        """Classes, padding, and whether the model's tokenizer tells the texts of a pair apart."""
        return {**self.labels.facts(), "pad_token_id": padding_token(self.tokenizer)}


class SequenceClassification(Task):
    """A head on the pooled text: `AutoModelForSequenceClassification`."""

    auto_class = AutoModelForSequenceClassification
    adapter_task = "SEQ_CLS"
    has_metrics = True

    def __init__(self, plan: Plan, facts: Any) -> None:
        super().__init__(plan, facts)
        self.section = plan.recipe.classification
        self.weights = class_weights(self.section, facts)
        section = plan.recipe.distillation
        labels = tuple(facts.get("labels", ()))
        self.distillation = None if section is None else Distillation(plan, section, self.auto_class, labels)

    @cached_property
    def tokenizer(self) -> Any:
        """Of the run, to show texts."""
        return AutoTokenizer.from_pretrained(self.facts["tokenizer_directory"])

    @classmethod
    def encoder(cls, recipe: Recipe) -> SequenceClassificationEncoder:
        """Make the encoder of the recipe."""
        return SequenceClassificationEncoder(recipe)

    @classmethod
    def derivations(cls, recipe: Recipe, prepared: PreparedData) -> list[Derivation]:
        """What the teacher says of each sample, where it is to be asked once."""
        found = super().derivations(recipe, prepared)
        section = recipe.distillation
        if section is not None and section.precompute:
            task = cls(plan_alone(recipe, samples_at_once(recipe)), prepared.facts)
            arguments = (recipe, section, prepared, cls.auto_class, task.collate)
            labels = tuple(prepared.facts["labels"])
            found.append(Annotations(ClassTargets(*arguments, inputs=model_inputs, labels=labels)))
        return found

    def build_model(self) -> torch.nn.Module:
        """Build the model, with what a distillation adds."""
        model: torch.nn.Module = with_projections(super().build_model(), self.plan)
        return model

    def config(self) -> Any:
        """Return the model's config with the classes' names, and the padding that a decoder's head must skip."""
        return with_labels(super().config(), self.section.problem_type, self.facts)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad to the longest sample: `input_ids`, `attention_mask`, `token_type_ids` [samples, length], `labels`."""
        batch = pad(samples, "input_ids", self.facts["pad_token_id"])
        batch["token_type_ids"] = pad(samples, "token_type_ids", 0)["token_type_ids"]
        batch["labels"] = torch.from_numpy(np.stack([sample["labels"] for sample in samples]))
        return {**batch, **collate_known(samples, batch["input_ids"].shape[1])}

    def num_targets(self, batch: Batch) -> int:
        """Count the samples that have a label."""
        return int(is_counted(batch["labels"]).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Loss of the samples' classes; see `classification_loss`."""
        inputs = model_inputs(model, batch)
        teaching = self.distillation if model.training else None
        student = model(**inputs, **({} if teaching is None else teaching.wanted))
        output = classification_loss(student.logits, batch["labels"], self.section, self.weights)
        if teaching is None:
            return output
        counted, present = is_counted(batch["labels"]), batch["attention_mask"].float()
        positions = present / present.sum(dim=1, keepdim=True) * counted[:, None]
        known = {name: batch[name] for name in ("teacher_logits",) if name in batch}
        total = teaching.loss(output.loss_sum, student, inputs, counted, positions, known)
        return replace(output, loss_sum=total)

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """Measure with scikit-learn, and show some texts with what the model takes them for."""
        found = classification_metrics(predictions, self.section, self.facts)
        answers = shown_answers(predictions, self.section, self.facts)
        texts = [self.tokenizer.decode(samples[index]["input_ids"].tolist()) for index in range(len(answers))]
        shown = [{"text": text, **answer} for text, answer in zip(texts, answers, strict=True)]
        return replace(found, report={**found.report, "samples": shown})

    def answers(self, predictions: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
        """Class and probabilities of each sample."""
        return classification_answers(predictions["logits"], self.section, self.facts)


def with_labels(config: Any, problem_type: str, facts: Any) -> Any:
    """Write names of the classes into a transformers config."""
    config.problem_type = HF_PROBLEM_TYPES[problem_type]
    config.id2label = dict(enumerate(facts["labels"])) if facts["labels"] else {0: "value"}
    config.label2id = {name: number for number, name in config.id2label.items()}
    if "pad_token_id" in facts:
        config.pad_token_id = facts["pad_token_id"]
    return config


def model_inputs(model: Any, batch: Batch) -> Batch:
    """What a model reads of a batch."""
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if reads_token_types(model) else [])]
    return {name: batch[name] for name in names}


def reads_token_types(model: Any) -> bool:
    """Whether a model tells the texts of a pair apart (BERT does, GPT-2 takes them for words, Llama not at all)."""
    config = getattr(model, "module", model).config
    return int(getattr(config, "type_vocab_size", 0) or 0) > 1
