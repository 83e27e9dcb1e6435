"""The keepers of all nodes, as the driver sees them, and what a worker is given of them."""

import io
import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launcher.checkpoints.manifest import Manifest
from launcher.checkpoints.memory import Generation, Offer, newest_whole, open_extent
from launcher.errors import CheckpointError
from launcher.orchestration.keeper import PIECE, Keeper

ANSWER_TIMEOUT_S = 5.0
"""How long a keeper may take to say what it has; one that does not is taken to be gone with its node."""
DOUBTFUL_TIMEOUT_S = 0.5
THREADS = 8
START_TIMEOUT_S = 60.0
"""How long a rank waits for its node's keeper, which may just be starting."""


class Keepers:
    """One on each node that ever had a worker; the driver owns them, so they end with it."""

    def __init__(self) -> None:
        self._keepers: dict[str, Any] = {}
        self._starting: dict[str, Any] = {}

    def start(self, nodes: Sequence[str]) -> None:
        """Start those that are missing; returns at once.

        Args:
            nodes: Ray's ids of the nodes.
        """
        actor_class = ray.remote(Keeper)
        for node in dict.fromkeys(nodes):
            if node not in self._keepers:
                where = NodeAffinitySchedulingStrategy(node, soft=False)
                options = {"max_concurrency": THREADS, "max_restarts": 0, "num_cpus": 0}
                self._keepers[node] = actor_class.options(scheduling_strategy=where, **options).remote()
                self._starting[node] = self._keepers[node].inventory.remote()

    def newest(self, doubtful: Collection[str] = ()) -> Generation | None:
        """The newest whole generation on the nodes that answer.

        Args:
            doubtful: nodes that may be gone, for which nobody waits long.
        """
        asked = {node: keeper.inventory.remote() for node, keeper in self._ready()}
        _await([reference for node, reference in asked.items() if node not in doubtful], ANSWER_TIMEOUT_S)
        _await([reference for node, reference in asked.items() if node in doubtful], DOUBTFUL_TIMEOUT_S)
        kept = {}
        for node, reference in asked.items():
            try:
                kept[node] = ray.get(reference, timeout=0)
            except RayError:
                if node not in doubtful:
                    ray.kill(self._keepers.pop(node), no_restart=True)
        return newest_whole(kept)

    def _ready(self) -> list[tuple[str, Any]]:
        """A keeper that is still starting keeps nothing, and nobody waits for its answer."""
        started = _await(list(self._starting.values()), 0)
        self._starting = {node: reference for node, reference in self._starting.items() if reference not in started}
        return [(node, keeper) for node, keeper in self._keepers.items() if node not in self._starting]

    def of_rank(self, rank: int, where: Sequence[str], source: Generation | None) -> "RankMemory":
        """What a rank is given.

        Args:
            rank: of the worker.
            where: Ray's id of each rank's node.
            source: what the attempt may begin with.
        """
        own, nodes = where[rank], list(dict.fromkeys(where))
        following = nodes[(nodes.index(own) + 1) % len(nodes)]
        places = {} if source is None else source.places
        holders = {
            other: tuple((node, self._keepers[node]) for node in sorted(held, key=lambda node: node != own))
            for other, held in places.items()
        }
        return RankMemory(
            rank,
            own,
            self._keepers[own],
            None if following == own else self._keepers[following],
            None if source is None else Source(source.token, source.manifest, holders),
        )

    def close(self) -> None:
        """End all of them, and with them what they keep."""
        for keeper in self._keepers.values():
            ray.kill(keeper, no_restart=True)
        self._keepers.clear()
        self._starting.clear()


def _await(references: list[Any], timeout_s: float) -> set[Any]:
    """Those of some answers that come within a time."""
    return set(ray.wait(references, num_returns=len(references), timeout=timeout_s)[0]) if references else set()


def _answer(reference: Any) -> str | None:
    """What this node's keeper says."""
    try:
        said: str | None = ray.get(reference, timeout=START_TIMEOUT_S)
    except RayError as error:
        return f"this node's keeper does not answer: {type(error).__name__}"
    return said


@dataclass(frozen=True)
class Source:
    """A generation to begin with.

    Attributes:
        token: of it.
        manifest: with all files.
        holders: of each rank's part, the nearest first: (node, keeper).
    """

    token: str
    manifest: Manifest
    holders: dict[int, tuple[tuple[str, Any], ...]]


class RankMemory:
    """A rank's `HostMemory`: its node's keeper, the next node's, and those that have what it begins with."""

    def __init__(self, rank: int, node: str, keeper: Any, next_keeper: Any | None, source: Source | None) -> None:
        self.rank = rank
        self.node = node
        self._keeper, self._next, self._source = keeper, next_keeper, source

    @property
    def source(self) -> Manifest | None:
        """See `HostMemory.source`."""
        return None if self._source is None else self._source.manifest

    @property
    def source_token(self) -> str | None:
        """See `HostMemory.source_token`."""
        return None if self._source is None else self._source.token

    def keep(self, offer: Offer) -> str | None:
        """See `HostMemory.keep`."""
        return _answer(self._keeper.take.remote(offer, self._next))

    def delivered(self, token: str) -> str | None:
        """See `HostMemory.delivered`."""
        return _answer(self._keeper.delivered.remote(token, self.rank))

    def faults(self, names: Sequence[str]) -> list[str]:
        """See `HostMemory.faults`."""
        source, by_rank = self._given(), defaultdict[int, list[str]](list)
        for name in names:
            by_rank[source.manifest.files[name].rank].append(name)
        wrong = []
        for rank, own in by_rank.items():
            _, keeper = source.holders[rank][0]
            try:
                wrong += ray.get(keeper.faults.remote(source.token, rank, own))
            except RayError as error:
                wrong.append(f"rank {rank}'s part cannot be had any more: {type(error).__name__}")
        return wrong

    def read(self, name: str) -> BinaryIO:
        """See `HostMemory.read`."""
        source = self._given()
        rank = source.manifest.files[name].rank
        for node, keeper in source.holders[rank]:
            with suppress(RayError, OSError):
                if node == self.node:
                    return self._beside(keeper, source.token, rank, name)
                return self._fetched(keeper, source.token, rank, name, source.manifest.files[name].size)
        raise CheckpointError(f"{name} of step {source.manifest.step} is in no node's memory any more")

    def _beside(self, keeper: Any, token: str, rank: int, name: str) -> BinaryIO:
        """Out of the memory of a process on this machine."""
        process, descriptor, extent = ray.get(keeper.extent.remote(token, rank, name))
        own = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDONLY)
        try:
            return open_extent(own, extent)
        finally:
            os.close(own)

    def _fetched(self, keeper: Any, token: str, rank: int, name: str, size: int) -> BinaryIO:
        """From another machine."""
        content = io.BytesIO()
        for offset in range(0, size, PIECE):
            content.write(ray.get(keeper.piece.remote(token, rank, name, offset)))
        content.seek(0)
        return content

    def _given(self) -> Source:
        if self._source is None:
            raise CheckpointError("no state was in memory when the attempt began")
        return self._source
