"""What states in host memory take of a node (`fault_tolerance.memory_checkpoint`), and where they cannot be had."""

from collections.abc import Iterator, Sequence

from launcher.errors import Problem
from launcher.planning.layout import Layout, Resources
from launcher.planning.memory import MemoryPlan
from launcher.planning.rank_memory import RankMemory
from launcher.recipe.schema import Recipe

GENERATIONS = 2
"""The newest whole one, and the one that is being made."""


def saved_bytes(states: MemoryPlan) -> int:
    """Bytes of a rank's states in a checkpoint, at most: weights and optimizer states, wherever they live."""
    return states.parameters + states.optimizer + states.host_parameters + states.host_optimizer


def kept_bytes(recipe: Recipe, ranks: Sequence[RankMemory], resources: Resources) -> int:
    """Host memory of a node for the states that it keeps: those of its own ranks, and of as many of another node."""
    if recipe.fault_tolerance.memory_checkpoint is None:
        return 0
    copies = GENERATIONS * (1 if resources.nodes == 1 else 2)
    return max(saved_bytes(rank.states) for rank in ranks) * copies * resources.workers_per_node


def kept_problems(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """What no test of ours has brought back from memory."""
    if recipe.fault_tolerance.memory_checkpoint is None:
        return
    unproved = []
    if layout.expert_parallel_size > 1:
        unproved.append((f"parallel.expert_parallel_size {layout.expert_parallel_size}", "experts"))
    if recipe.adapter is not None:
        unproved.append(("adapter", "an adapter"))
    for setting, what in unproved:
        yield Problem(
            f"meets {setting}, and no test of ours has brought {what} back from memory; remove it, and set "
            "checkpoint.save_steps to what a failure may cost",
            "fault_tolerance.memory_checkpoint",
        )
