"""Where a run is, what one look at its workers shows, and what a supervisor asks of them. Pure: no ray, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from launcher.orchestration.detection import Hang
from launcher.orchestration.failure import Failure
from launcher.training.context import Beat


class RunState(StrEnum):
    """Where a run is."""

    STARTING = "starting"
    RUNNING = "running"
    DRAINING = "draining"
    """Asked to stop: the workers go on to a step boundary that all of them agree on."""
    SAVING = "saving"
    """Asked to stop: the workers save."""
    RECOVERING = "recovering"
    """An attempt failed; the next one is about to start."""
    RESIZING = "resizing"
    """The next attempt will have another size."""
    WAITING = "waiting for nodes"
    COMPLETE = "complete"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether the run has ended."""
        return self in (RunState.COMPLETE, RunState.STOPPED, RunState.FAILED)

    @property
    def has_workers(self) -> bool:
        """Whether workers run."""
        return self in (RunState.RUNNING, RunState.DRAINING, RunState.SAVING)


@dataclass(frozen=True)
class GroupStatus:
    """One look at a worker group.

    Attributes:
        beats: newest heartbeat by rank (ranks that did not answer yet are absent).
        failures: of the ranks that failed.
        results: of the ranks that returned, by rank: `TrainResult` as a mapping.
        leaving: nodes of the group that are about to be taken away.
    """

    beats: dict[int, Beat] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    results: dict[int, dict[str, Any]] = field(default_factory=dict)
    leaving: tuple[str, ...] = ()


class Group(Protocol):
    """The workers of one attempt after another."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def missing_nodes(self) -> int:
        """How many nodes fewer there are than the group needs."""
        ...

    @property
    def nodes(self) -> int:
        """How many nodes the group has or is about to start on."""
        ...

    def best_size(self) -> int | None:
        """The largest number of nodes that the cluster can give and the plan can use; None: this size or none."""
        ...

    def resize(self, nodes: int) -> None:
        """Start on so many nodes from now on."""
        ...

    def start(self, attempt: int, avoid: Sequence[str]) -> None:
        """Start every rank, on none of the nodes to avoid if that can be; returns when their training threads run."""
        ...

    def saved_step(self) -> int:
        """Step of the newest checkpoint that is committed, 0 without one."""
        ...

    def kept_step(self) -> int:
        """Step of the newest state that is whole in the memory of the nodes, 0 without one."""
        ...

    def node_of(self, rank: int) -> str:
        """Host name of a rank's node."""
        ...

    def examine(self, hang: Hang) -> str:
        """Keep what can be learned of a group that stands still, before it is ended; says where that is."""
        ...

    def poll(self) -> GroupStatus:
        """Look at the group; returns within the poll interval, at once when a rank ended."""
        ...

    def request_stop(self) -> None:
        """Ask all ranks to save and end at the next step boundary."""
        ...

    def stop(self) -> None:
        """End every rank now; also fine when there is none."""
        ...
