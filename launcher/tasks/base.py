"""What a task is: the model, the samples, and a loss as a sum with the count it is divided by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

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
    """

    loss_sum: Tensor
    num_targets: Tensor
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class Task(Protocol):
    """One kind of training. Nothing in it knows of ranks, ZeRO or accumulation."""

    def build_model(self) -> torch.nn.Module:
        """Build the model (random or pretrained weights, as the recipe says) in the recipe's precision."""
        ...

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples into the tensors of one micro batch, on the host."""
        ...

    def num_targets(self, batch: Batch) -> int:
        """How many targets `loss` will sum over, from the host's batch alone (known before forward)."""
        ...

    def loss(self, model: torch.nn.Module, batch: Batch) -> LossOutput:
        """Run forward and return loss sum and count."""
        ...
