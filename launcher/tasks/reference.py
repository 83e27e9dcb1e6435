"""What the reference model of preference optimisation says of each answer, computed once when data is prepared."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launcher.data.examples import Example, Field
from launcher.data.store import PreparedData, Split
from launcher.models.build import build_model
from launcher.planning.alone import plan_alone
from launcher.recipe.schema import Recipe
from launcher.tasks.asking import asked_device, in_batches, model_identity, samples_at_once

Batch = dict[str, Tensor]
BYTES_PER_NUMBER = 4


class ReferenceScores(ABC):
    """Sums of the log-probabilities of answers' tokens under the model that training begins with, in fp32.

    A task names the scores (`names`) and computes them (`score`).

    Args:
        recipe: names the model; its adapter, if any, is left out, as at the start it changes nothing.
        prepared: the samples.
        auto_class: of the task.
        collate: makes batches of samples.
    """

    name = "log-probabilities of the reference"
    splits: tuple[Split, ...] = ("train", "validation")
    names: tuple[str, ...] = ()

    def __init__(
        self, recipe: Recipe, prepared: PreparedData, auto_class: Any, collate: Callable[[Sequence[Any]], Batch]
    ) -> None:
        self.prepared = prepared
        self._size = samples_at_once(recipe)
        self._plan = plan_alone(recipe.model_copy(update={"adapter": None}), self._size)
        self._auto_class, self._collate = auto_class, collate

    def identity(self) -> Any:
        """The model."""
        return model_identity(self._plan)

    def fields(self) -> dict[str, Field]:
        """A number each, and what `extras` adds."""
        return {name: Field("float32", ()) for name in self.names}

    def bytes_of(self, dataset: Sequence[Any]) -> int:
        """A number for each answer."""
        return len(dataset) * len(self.names) * BYTES_PER_NUMBER

    def extras(self, dataset: Sequence[Any], row: int) -> Example:
        """Further fields of a sample, which `collate` needs already."""
        return {}

    @abstractmethod
    def score(self, model: Any, batch: Batch) -> Mapping[str, Tensor]:
        """The numbers of a batch's samples, [samples] each."""

    @cached_property
    def _model(self) -> Any:
        """The reference, built when it is first asked."""
        return build_model(self._plan, self._auto_class).to(asked_device()).eval()

    @torch.no_grad()
    def annotate(self, dataset: Sequence[Any], rows: range) -> list[Example]:
        """Score some samples."""
        found: list[Example] = []
        for some in in_batches(rows, self._size):
            extras = [self.extras(dataset, row) for row in some]
            samples = [{**dataset[row], **extra} for row, extra in zip(some, extras, strict=True)]
            batch = {name: values.to(self._model.device) for name, values in self._collate(samples).items()}
            scores = {name: values.float().cpu().numpy() for name, values in self.score(self._model, batch).items()}
            for index, extra in enumerate(extras):
                found.append({**extra, **{name: np.array(values[index]) for name, values in scores.items()}})
        return found

    def notes(self, datasets: Sequence[Sequence[Any]]) -> list[str]:
        """Nothing."""
        return []
