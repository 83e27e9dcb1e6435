"""What a simulation is given and what it keeps: a cluster on paper, a clock that is moved, and events. Pure."""

from dataclasses import dataclass, field
from typing import Any

DAY = 86_400.0


@dataclass(frozen=True)
class Scenario:
    """A cluster, a training, and what befalls them. Times are seconds unless their name says otherwise.

    Attributes:
        nodes: that the run trains on.
        mtbf_node_days: mean days between two failures of one node; failures are independent and have no memory.
        days: to simulate.
        step_seconds: an optimizer step.
        save_steps: steps between two checkpoints.
        save_seconds: for which a checkpoint stops training.
        start_seconds: from starting the workers to the first step: imports, rendezvous, engine, load.
        detect_seconds: from a failure to its notice.
        teardown_seconds: to end the failed attempt's workers.
        memory_steps: steps between two states that are kept in the memory of a node and of its neighbour; None: none.
        memory_seconds: for which such a state stops training.
        spare_nodes: that wait to replace lost ones; None: a lost node is replaced at once, always.
        repair_hours: until a lost node comes back.
        hang_share: share of the failures in which a node stands still instead of dying.
        preemptions_per_node_day: nodes taken away with notice; they come back after the repair time.
        slow_node_days: mean days between two spells of slowness of one node; None: never.
        slow_factor: a step takes so many times longer while one of the nodes is slow.
        slow_hours: length of a spell.
        min_nodes: fewest nodes to go on with; a step takes longer then, in proportion. None: all are needed.
        seed: of everything random.
    """

    nodes: int
    mtbf_node_days: float
    days: float = 30.0
    step_seconds: float = 10.0
    save_steps: int = 100
    save_seconds: float = 30.0
    start_seconds: float = 120.0
    detect_seconds: float = 1.0
    teardown_seconds: float = 5.0
    memory_steps: int | None = None
    memory_seconds: float = 1.0
    spare_nodes: int | None = None
    repair_hours: float = 24.0
    hang_share: float = 0.0
    preemptions_per_node_day: float = 0.0
    slow_node_days: float | None = None
    slow_factor: float = 2.0
    slow_hours: float = 1.0
    min_nodes: int | None = None
    seed: int = 0


@dataclass
class VirtualClock:
    """Seconds since the simulation began."""

    now: float = 0.0

    def __call__(self) -> float:
        """The time."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@dataclass
class Recorder:
    """Keeps the supervisor's events as the driver's journal would write them, on the virtual clock."""

    clock: VirtualClock
    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, state: str, facts: dict[str, Any], **more: Any) -> None:
        """Keep an event."""
        self.events.append({"time": self.clock.now, "state": state, **facts, **more})
