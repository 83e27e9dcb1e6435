"""Warm spare workers: processes that have imported everything and wait, so that the next attempt need not."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.orchestration.worker import Worker


class WarmPool:
    """Spares on the nodes of a group, at most one for each of its workers.

    They hold no CPUs and no GPUs of Ray's: a spare that is taken works on what the worker that it replaces has held,
    and the placement group of the next attempt holds that again.

    Args:
        run_directory: of the run.
        device: that they will train on.
        environment: set before they import.
    """

    def __init__(self, run_directory: str, device: str, environment: dict[str, str]) -> None:
        self.run_directory = run_directory
        self.device = device
        self.environment = environment
        self._spares: defaultdict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def fill(self, nodes: Sequence[str], each: int) -> None:
        """Start what is missing; returns at once.

        Args:
            nodes: Ray's ids of the nodes.
            each: spares on each of them.
        """
        actor_class = ray.remote(Worker)
        for node in nodes:
            for _ in range(each - len(self._spares[node])):
                strategy = NodeAffinitySchedulingStrategy(node, soft=False)
                actor = actor_class.options(
                    max_concurrency=3, max_restarts=0, num_cpus=0, scheduling_strategy=strategy
                ).remote(self.run_directory)
                self._spares[node].append((actor, actor.warm_up.remote(self.device, self.environment)))

    def count_ready(self) -> int:
        """Spares that wait."""
        return sum(len(self._ready(node)) for node in self._spares)

    def take(self, node: str, count: int) -> list[Any]:
        """Up to so many spares of a node, those that wait; they are no spares any more."""
        taken = self._ready(node)[:count]
        self._spares[node] = [spare for spare in self._spares[node] if spare not in taken]
        return [actor for actor, _ in taken]

    def _ready(self, node: str) -> list[tuple[Any, Any]]:
        """The spares of a node that wait; those that died or had no memory are forgotten."""
        references = [reference for _, reference in self._spares[node]]
        ended = set(ray.wait(references, num_returns=len(references), timeout=0)[0]) if references else set()
        failed = {reference for reference in ended if not _succeeded(reference)}
        self._spares[node] = [spare for spare in self._spares[node] if spare[1] not in failed]
        return [spare for spare in self._spares[node] if spare[1] in ended]

    def close(self) -> None:
        """End all spares."""
        for spares in self._spares.values():
            for actor, _ in spares:
                ray.kill(actor, no_restart=True)
        self._spares.clear()


def _succeeded(reference: Any) -> bool:
    try:
        ray.get(reference)
    except RayError:
        return False
    return True
