"""Whether a plan fits into the memory of devices and nodes, and what to change if it does not."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from launcher.errors import PlanError, Problem
from launcher.planning.combinations import combination_of
from launcher.planning.deepspeed_config import DeepSpeedPlan, make_deepspeed_config
from launcher.planning.estimate import accelerator_of, estimate_ranks
from launcher.planning.kept_states import kept_bytes
from launcher.planning.layout import BatchPlan, Layout, Resources, divisors
from launcher.planning.rank_memory import RankMemory
from launcher.recipe.schema import Recipe

USABLE = 0.95
"""Share of a device's memory that tensors can have; the rest is what the caching allocator cannot use between them."""
HOST_USABLE = 0.90
"""Share of a node's memory that offloaded states can have; the rest is the system's and the processes' own."""
_GIB = 2**30


@dataclass(frozen=True)
class Candidate:
    """A recipe on a layout, as far as its memory depends on it."""

    recipe: Recipe
    config: Mapping[str, Any]
    layout: Layout
    batch: BatchPlan
    deepspeed: DeepSpeedPlan
    resources: Resources

    def ranks(self) -> tuple[RankMemory, ...] | None:
        """What the ranks of each stage hold; `None` when that is not counted."""
        return estimate_ranks(self.recipe, self.config, self.layout, self.batch, self.deepspeed, self.resources.device)


def fit_problems(candidate: Candidate) -> list[Problem]:
    """Say what does not fit, which part is the largest, and which single changes make it fit; empty when all fits.

    What cannot be counted, and memory that is not known, is taken to fit.

    Raises:
        PlanError: the accelerator is not in the catalogue.
    """
    ranks = candidate.ranks()
    if ranks is None:
        return []
    return [*_device_problems(candidate, ranks), *_host_problems(candidate, ranks)]


def device_memory(resources: Resources) -> int | None:
    """Bytes that tensors can have on a worker's GPU; `None` when it is not known, and on CPU, which has no own."""
    accelerator = None if resources.device == "cpu" else accelerator_of(resources)
    return None if accelerator is None else int(accelerator.memory * USABLE)


def _device_problems(candidate: Candidate, ranks: tuple[RankMemory, ...]) -> Iterator[Problem]:
    memory = device_memory(candidate.resources)
    fullest = max(ranks, key=lambda rank: rank.device_bytes)
    if memory is None or fullest.device_bytes <= memory:
        return
    parts = largest_parts(fullest)
    shown = ", ".join(f"{name} {_gib(size)}" for name, size in parts)
    field = "training.micro_batch_size" if parts[0][0] in ("activations", "loss") else "zero"
    stage = f" of pipeline stage {fullest.stage}" if len(ranks) > 1 else ""
    yield Problem(
        f"a rank{stage} needs {_gib(fullest.device_bytes)}, and {candidate.resources.accelerator} has {_gib(memory)} "
        f"for it ({shown}); {_advice(candidate, memory)}",
        field,
    )


def _host_problems(candidate: Candidate, ranks: tuple[RankMemory, ...]) -> Iterator[Problem]:
    resources = candidate.resources
    kept = kept_bytes(candidate.recipe, ranks, resources)
    needed = max(rank.host_bytes for rank in ranks) * resources.workers_per_node
    if resources.host_memory is None or needed + kept <= resources.host_memory * HOST_USABLE:
        return
    if kept and needed <= resources.host_memory * HOST_USABLE:
        yield Problem(
            f"keeps {_gib(kept)} of states in a node's memory, which has {_gib(resources.host_memory)}; of them "
            f"{HOST_USABLE:.0%} can be had, and offloaded states take {_gib(needed)}; use more nodes, or remove it",
            "fault_tolerance.memory_checkpoint",
        )
        return
    yield Problem(
        f"the {resources.workers_per_node} workers of a node offload {_gib(needed)}, and the node has "
        f"{_gib(resources.host_memory)}, of which {HOST_USABLE:.0%} can be had; use more nodes, or keep states on the "
        "devices (zero.offload_optimizer: none, zero.offload_param: none)",
        "zero.offload_optimizer",
    )


def largest_parts(rank: RankMemory) -> list[tuple[str, int]]:
    """What a rank holds at its fullest moment, the largest first."""
    parts = {
        "parameters": rank.states.parameters,
        "gradients": rank.states.gradients,
        "optimizer states": rank.states.optimizer,
    }
    if rank.backward_bytes >= rank.step_bytes:
        parts |= {
            "activations": rank.activations + max(rank.recomputation, rank.gradient),
            "loss": max(0, rank.loss - max(rank.recomputation, rank.gradient)),
            "buffers": rank.buffers,
        }
    else:
        parts["buffers"] = rank.step_buffers
    parts["CUDA and NCCL"] = rank.overhead
    return sorted(((name, size) for name, size in parts.items() if size), key=lambda part: -part[1])


def _advice(candidate: Candidate, memory: int) -> str:
    """The single changes after which it fits."""
    changes = itertools.chain(_smaller_batches(candidate), _other_changes(candidate))
    found: dict[str, str] = {}
    for field, value, changed in changes:
        ranks = None if field in found else changed.ranks()
        if ranks is not None and max(rank.device_bytes for rank in ranks) <= memory:
            found[field] = value
    if found:
        return f"it fits with {' or with '.join(f'{field} {value}' for field, value in found.items())}"
    return "no single change is enough: use more devices, or have zerofleet plan --search look for a layout"


def _smaller_batches(candidate: Candidate) -> Iterator[tuple[str, str, Candidate]]:
    """The same global batch in smaller micro batches, the largest first."""
    batch, replicas = candidate.batch, candidate.layout.data_parallel_size
    for micro in reversed(divisors(batch.global_batch_size // replicas)):
        if micro < batch.micro_batch_size:
            accumulation = batch.global_batch_size // replicas // micro
            update = {"micro_batch_size": micro, "gradient_accumulation_steps": accumulation}
            yield "training.micro_batch_size", str(micro), replace(candidate, batch=batch.model_copy(update=update))


def _other_changes(candidate: Candidate) -> Iterator[tuple[str, str, Candidate]]:
    """Recomputation, higher stages, offload: what the table of combinations has for this layout."""
    recipe, row = candidate.recipe, combination_of(candidate.layout)
    if not recipe.training.gradient_checkpointing:
        yield "training.gradient_checkpointing", "true", replace(candidate, recipe=with_checkpointing(recipe, True))
    stage = candidate.deepspeed.zero_stage
    stages = sorted(higher for higher in (row.zero_stages if row else ()) if higher > stage)
    wanted: list[tuple[str, str, dict[str, Any]]] = [
        ("zero.stage", str(higher), {"stage": higher}) for higher in stages
    ]
    if row is not None and row.offload and stage > 0 and candidate.deepspeed.offload_optimizer == "none":
        wanted.append(("zero.offload_optimizer", "cpu", {"stage": stage, "offload_optimizer": "cpu"}))
    for field, value, update in wanted:
        changed = recipe.model_copy(update={"zero": recipe.zero.model_copy(update=update)})
        try:
            deepspeed = make_deepspeed_config(
                changed, candidate.layout, candidate.batch, candidate.config["model_type"]
            )
        except PlanError:  # the recipe's own DeepSpeed file says otherwise
            continue
        yield field, value, replace(candidate, recipe=changed, deepspeed=deepspeed)


def with_checkpointing(recipe: Recipe, gradient_checkpointing: bool) -> Recipe:
    """The same recipe, recomputing activations or not."""
    training = recipe.training.model_copy(update={"gradient_checkpointing": gradient_checkpointing})
    return recipe.model_copy(update={"training": training})


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"
