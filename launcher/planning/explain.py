"""What a change does to memory and time, part by part."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

from launcher.planning.plan import Plan
from launcher.planning.rank_memory import RankMemory
from launcher.planning.search import WORDS


class Row(NamedTuple):
    """One figure before and after."""

    name: str
    unit: Literal["count", "bytes", "seconds"]
    before: float
    after: float


def compare(before: Plan, after: Plan) -> list[Row]:
    """Compare two plans; figures that are 0 in both are left out, and so is what one of them does not know."""
    return [row for row in _rows(before, after) if row.before or row.after]


def _rows(before: Plan, after: Plan) -> Iterator[Row]:
    for name in ("data", "tensor", "pipeline", "sequence", "expert"):
        field = f"{name}_parallel_size"
        yield Row(f"{name}-parallel ranks", "count", getattr(before.layout, field), getattr(after.layout, field))
    yield Row("micro batch", "count", before.batch.micro_batch_size, after.batch.micro_batch_size)
    steps = (before.batch.gradient_accumulation_steps, after.batch.gradient_accumulation_steps)
    yield Row("accumulation", "count", *steps)
    yield Row("global batch", "count", before.batch.global_batch_size, after.batch.global_batch_size)
    if before.ranks is not None and after.ranks is not None:
        old, new = (max(plan.ranks or (), key=lambda rank: rank.device_bytes) for plan in (before, after))
        for (name, size), (_, other) in zip(_memory(old), _memory(new), strict=True):
            yield Row(name, "bytes", size, other)
    if before.step is not None and after.step is not None:
        for name, seconds in before.step.parts.items():
            yield Row(WORDS[name], "seconds", seconds, after.step.parts[name])
        yield Row("a step", "seconds", before.step.seconds, after.step.seconds)
        rates = (before.step.tokens_per_second_per_device, after.step.tokens_per_second_per_device)
        yield Row("tokens a second on each device", "count", *rates)


def _memory(rank: RankMemory) -> list[tuple[str, int]]:
    """Of the fullest rank."""
    states = rank.states
    return [
        ("parameters on a rank", states.parameters),
        ("gradients on a rank", states.gradients),
        ("optimizer states on a rank", states.optimizer),
        ("activations on a rank", rank.activations),
        ("loss, or one layer made again", max(rank.loss, rank.recomputation, rank.gradient)),
        ("buffers in the backward pass", rank.buffers),
        ("buffers in the optimizer step", rank.step_buffers),
        ("CUDA and NCCL", rank.overhead),
        ("a rank at its fullest", rank.device_bytes),
        ("a rank in host memory", rank.host_bytes),
        ("a rank on NVMe", rank.nvme_bytes),
    ]
