"""What a teacher says of each training sample, computed when data is prepared, so that training needs no teacher."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from launcher.data.examples import Example, Field
from launcher.data.store import PreparedData, Split
from launcher.recipe.schema import Recipe
from launcher.recipe.task_sections import DistillationSection
from launcher.tasks.asking import asked_device, in_batches, samples_at_once, tokens_of, weights_identity
from launcher.tasks.teacher import Teacher

Batch = dict[str, Tensor]
FILLED = {"teacher_ids": 0, "teacher_log_probs": 0.0, "teacher_rest": 0.0}
"""Fields of a language model's positions, and what stands in them where nothing counts."""
BYTES_PER_NUMBER = 4


class _Targets:
    """What both kinds of teachers share."""

    name = "what the teacher says"
    splits: tuple[Split, ...] = ("train",)

    def __init__(
        self,
        recipe: Recipe,
        section: DistillationSection,
        prepared: PreparedData,
        auto_class: Any,
        collate: Callable[[Sequence[Any]], Batch],
    ) -> None:
        self.prepared, self.section = prepared, section
        self._recipe, self._size = recipe, samples_at_once(recipe)
        self._auto_class, self._collate = auto_class, collate

    def notes(self, datasets: Sequence[Sequence[Any]]) -> list[str]:
        """Nothing."""
        return []

    def _identity(self) -> list[Any]:
        section = self.section
        return [weights_identity(section.teacher_name_or_path, self._recipe), section.dtype]


class ClassTargets(_Targets):
    """All logits of a classifier.

    Args:
        inputs: what the teacher reads of a batch, given the teacher.
        labels: names of the classes.
    """

    def __init__(self, *args: Any, inputs: Callable[[Any, Batch], Batch], labels: tuple[str, ...]) -> None:
        super().__init__(*args)
        self._inputs, self._labels = inputs, labels

    def identity(self) -> Any:
        """The teacher."""
        return self._identity()

    def fields(self) -> dict[str, Field]:
        """A number for each class."""
        return {"teacher_logits": Field("float32", (len(self._labels),))}

    def bytes_of(self, dataset: Sequence[Any]) -> int:
        """A number for each class."""
        return len(dataset) * len(self._labels) * BYTES_PER_NUMBER

    @cached_property
    def _teacher(self) -> Teacher:
        return Teacher(self.section, self._auto_class, self._size, len(self._labels), self._labels)

    def annotate(self, dataset: Sequence[Any], rows: range) -> list[Example]:
        """Ask the teacher."""
        found: list[Example] = []
        for some in in_batches(rows, self._size):
            batch = {name: values.to(asked_device()) for name, values in self._collate(_samples(dataset, some)).items()}
            inputs = self._inputs(self._teacher.model, batch)
            logits = self._teacher.logits(asked_device(), **inputs).cpu().numpy()
            found += [{"teacher_logits": row} for row in logits]
        return found


class TokenTargets(_Targets):
    """A language model's most probable tokens at each position, softened, and the probability of all others together.

    Args:
        tokens: the size of the student's vocabulary.
    """

    def __init__(self, *args: Any, tokens: int) -> None:
        super().__init__(*args)
        self._tokens = tokens
        self._top = min(self.section.top_k, tokens)

    def identity(self) -> Any:
        """The teacher, how many tokens, and the temperature."""
        return [*self._identity(), self._top, self.section.temperature]

    def fields(self) -> dict[str, Field]:
        """K numbers a position, one position after the other, and one for the rest."""
        kind = "uint16" if self._tokens <= 1 << 16 else "uint32"
        return {"teacher_ids": Field(kind), "teacher_log_probs": Field("float32"), "teacher_rest": Field("float32")}

    def bytes_of(self, dataset: Sequence[Any]) -> int:
        """For each position k numbers, k ids and the rest."""
        width = 2 if self._tokens <= 1 << 16 else 4
        return tokens_of(dataset) * (self._top * (width + BYTES_PER_NUMBER) + BYTES_PER_NUMBER)

    @cached_property
    def _teacher(self) -> Teacher:
        return Teacher(self.section, self._auto_class, self._size, self._tokens)

    @torch.no_grad()
    def annotate(self, dataset: Sequence[Any], rows: range) -> list[Example]:
        """Ask the teacher."""
        found: list[Example] = []
        for some in in_batches(rows, self._size):
            samples = _samples(dataset, some)
            batch = self._collate(samples)
            inputs = {name: batch[name].to(asked_device()) for name in ("input_ids", "position_ids")}
            logits = self._teacher.logits(asked_device(), **inputs, use_cache=False)
            for sample, row in zip(samples, logits, strict=True):
                own = row[: len(sample["input_ids"])]
                found.append(softened(own, self._top, self.section.temperature))
        return found

    def notes(self, datasets: Sequence[Sequence[Any]]) -> list[str]:
        """How much probability lies outside of what is kept."""
        if self._top == self._tokens:
            return []
        outside = np.mean([np.exp(dataset[row]["teacher_rest"]).mean() for dataset in datasets
                           for row in range(0, len(dataset), max(1, len(dataset) // 64))])  # fmt: skip
        return [
            f"distillation.top_k: {self._top} of {self._tokens} tokens are kept at each position; at temperature "
            f"{self.section.temperature:g} the teacher gives {outside:.2%} of its probability to the others"
        ]


def _samples(dataset: Sequence[Any], rows: range) -> list[Any]:
    return [dataset[row] for row in rows]


def softened(logits: Tensor, top: int, temperature: float) -> dict[str, NDArray[Any]]:
    """The most probable tokens of each position.

    Args:
        logits: [positions, tokens], fp32.
        top: how many tokens.
        temperature: logits are divided by it.

    Returns:
        `teacher_ids` and `teacher_log_probs` [positions x top], `teacher_rest` [positions]: the log-probability of all
        other tokens together.
    """
    whole = (logits / temperature).log_softmax(dim=-1)
    kept = whole.topk(top, dim=-1)
    rest = whole.scatter(-1, kept.indices, float("-inf")).logsumexp(dim=-1)
    return {
        "teacher_ids": kept.indices.flatten().cpu().numpy(),
        "teacher_log_probs": kept.values.flatten().cpu().numpy(),
        "teacher_rest": rest.cpu().numpy(),
    }


def collate_known(samples: Sequence[Any], length: int) -> Batch:
    """What the teacher said of some samples, filled up to one length.

    Returns:
        `teacher_ids` and `teacher_log_probs` [samples, length, k], `teacher_rest` [samples, length]; or
        `teacher_logits` [samples, classes]; empty where the samples have none.
    """
    if "teacher_logits" in samples[0]:
        return {"teacher_logits": torch.from_numpy(np.stack([sample["teacher_logits"] for sample in samples]))}
    if "teacher_rest" not in samples[0]:
        return {}
    batch: Batch = {}
    for name, filler in FILLED.items():
        rows = [sample[name].reshape(len(sample["teacher_rest"]), -1) for sample in samples]
        values = np.full(
            (len(rows), length, rows[0].shape[1]), filler, np.int64 if name == "teacher_ids" else np.float32
        )
        for index, row in enumerate(rows):
            values[index, : len(row)] = row
        batch[name] = torch.from_numpy(values if name != "teacher_rest" else values[..., 0])
    return batch
