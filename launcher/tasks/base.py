"""What a task is: the model, the samples, a loss as a sum with the count it is divided by, and metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from launcher.data.derived import Derivation
from launcher.data.examples import ExampleEncoder
from launcher.data.store import PreparedData
from launcher.models.adapters import choose_trained
from launcher.models.build import build_config, build_model
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.tasks.importance import Importance

Batch = dict[str, Tensor]
Sample = Mapping[str, Any]


@dataclass(frozen=True)
class LossOutput:
    """The loss of one micro batch.

    A sum and a count, because the mean of means is wrong as soon as two micro batches hold different numbers of
    targets: the training loop divides by the count of the whole global batch.

    Attributes:
        loss_sum: scalar with gradient, summed over targets, in nats for cross-entropies.
        num_targets: scalar int64, how many targets were summed.
        metrics: further (sum, count) pairs by name, detached.
        predictions: what `Task.metrics` needs of each sample, by name, detached; the first axis is the batch's.
    """

    loss_sum: Tensor
    num_targets: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    predictions: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Metrics:
    """What an evaluation measured besides the loss.

    Attributes:
        values: numbers by name; a recipe can stop early by any of them.
        report: tables and curves, of types that JSON knows; `samples` in it are mappings of name to text.
        text: for people.
        pictures: uint8 [height, width, channels] by name, for TensorBoard.
    """

    values: dict[str, float] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    pictures: dict[str, NDArray[Any]] = field(default_factory=dict)


class Task(Protocol):
    """One kind of training. Nothing in it knows of ranks, ZeRO or accumulation.

    Subclass it, and name the class in `launcher.recipe.tasks.TASKS`. What stands here is right for most tasks.

    Args:
        plan: of the run.
        facts: what the task's encoder learnt from the data (`ExampleEncoder.facts`); empty for packed text.
    """

    auto_class: ClassVar[Any]
    """The transformers auto class of the model."""
    has_metrics: ClassVar[bool] = False
    """Evaluate all predictions together (`metrics`), not the loss alone."""
    adapter_task: ClassVar[str | None] = None
    """peft's name of the kind of task (`CAUSAL_LM`); `None` for kinds that it does not know."""

    plan: Plan
    facts: Mapping[str, Any]

    def __init__(self, plan: Plan, facts: Mapping[str, Any]) -> None:
        self.plan = plan
        self.facts = facts

    @classmethod
    def encoder(cls, recipe: Recipe) -> ExampleEncoder | None:
        """Make what turns rows of the sources into examples; `None` for rows of packed text."""
        return None

    @classmethod
    def derivations(cls, recipe: Recipe, prepared: PreparedData) -> list[Derivation]:
        """What `prepare` computes with a model and keeps with the data, in order; each adds to the data before it."""
        ewc = recipe.optimizer.ewc
        return [] if ewc is None else [Importance(cls, recipe, ewc, prepared)]

    def config(self) -> Any:
        """Return the transformers config of the model, what the data says filled in."""
        return build_config(self.plan)

    def build_model(self) -> torch.nn.Module:
        """Build the model (random or pretrained weights, as the recipe says) in the recipe's precision."""
        model = build_model(self.plan, self.auto_class, self.config())
        chosen: torch.nn.Module = choose_trained(model, self.plan, self.adapter_task)
        return chosen

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples into the tensors of one micro batch, on the host."""
        ...

    def num_targets(self, batch: Batch) -> int:
        """How many targets `loss` will sum over, from the host's batch alone (known before forward)."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> LossOutput:
        """Run forward and return loss sum and count."""
        ...

    @property
    def writes(self) -> bool:
        """Whether the recipe wants `metrics` of what the model writes: then `written` is asked for every batch."""
        return False

    def written(self, model: torch.nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Let the model write something of each sample; all ranks of a run must call it together.

        Returns:
            More `predictions` of the batch.
        """
        return {}

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """Measure an evaluation.

        Args:
            predictions: of every evaluated sample, once and in stored order, whatever the number of ranks.
            samples: those samples, read when they are asked for.
        """
        return Metrics()

    def answers(self, predictions: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
        """Say what the model predicts of each sample, in words and numbers that JSON knows.

        Args:
            predictions: of one batch, by name, as `LossOutput` has them.
        """
        return []
