"""What a loss needs of all ranks' samples; every rank of a run must call it, for each micro batch.

Only data-parallel tasks use it, so that the group of all ranks is the data-parallel one. One process has the same
values without a process group.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _Gather(torch.autograd.Function):
    """Rows of all ranks, rank by rank; the gradient of a row is the sum of what all ranks' losses say of it."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        context.size = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0].contiguous().clone()
        dist.all_reduce(gradient)
        return gradient.narrow(0, context.size * dist.get_rank(), context.size)


def gathered(rows: Tensor) -> Tensor:
    """Rows of all ranks, of which each has as many: [ranks x rows, ...]; gradients flow back to every rank's own."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    whole: Tensor = _Gather.apply(rows)  # type: ignore[no-untyped-call]  # torch does not declare it
    return whole


def first_row(rows: Tensor) -> int:
    """Where this rank's own rows begin in `gathered(rows)`."""
    return len(rows) * dist.get_rank() if dist.is_initialized() else 0


def summed(values: Tensor) -> Tensor:
    """Sum over all ranks, without a gradient."""
    total = values.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total
