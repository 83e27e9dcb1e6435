"""Joining the process group, and the few collectives that the loop makes itself."""

import datetime
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from launcher.training import upstream

Value = TypeVar("Value")

COLLECTIVE_TIMEOUT_S = 1800.0
"""torch's own default. A dead peer is noticed at once (its connection closes); only a hung one takes this long."""


def join_process_group(device: str, local_rank: int) -> torch.device:
    """Join the group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe, and return this rank's device."""
    upstream.quiet_known_warnings()
    upstream.set_collective_timeout(COLLECTIVE_TIMEOUT_S)
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    dist.init_process_group(
        backend="nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    )
    upstream.disable_cpu_shared_memory_op()
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
    return torch.device(device, local_rank) if device == "cuda" else torch.device("cpu")


class Agreement:
    """One small all-reduce a step, started before the forward pass and read before the first backward pass.

    It carries how many targets the global batch holds (the loss is divided by it), whether any rank was asked to stop
    and whether rank 0 wants a checkpoint (so that all ranks end and save at the same step).
    """

    def __init__(self, num_targets: int, *, stop: bool, save: bool, device: torch.device) -> None:
        self._values = torch.tensor([num_targets, int(stop), int(save)], dtype=torch.int64, device=device)
        self._work: Any = dist.all_reduce(self._values, async_op=True)

    def read(self) -> tuple[int, bool, bool]:
        """Wait for the result: (targets of the global batch, whether to stop and whether to save after this step)."""
        self._work.wait()
        num_targets, stop, save = self._values.tolist()
        return int(num_targets), bool(stop), bool(save)


def sum_over_ranks(*values: float, device: torch.device) -> list[float]:
    """Sum each value over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor.tolist()]


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest value over all ranks."""
    tensor = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return float(tensor.item())


def broadcast(make: Callable[[], Value]) -> Value:
    """What rank 0 makes, on every rank; it must not raise, or the others would wait."""
    box = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]  # typed as optional


def all_gather(value: Value) -> list[Value]:
    """Every rank's value, by rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
