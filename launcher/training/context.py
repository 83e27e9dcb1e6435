"""What a worker knows of itself, and what it lets others see of it while it trains. No torch here."""

import threading
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from launcher.run_directory import RunDirectory


class Phase(StrEnum):
    """What a rank is doing."""

    STARTING = "starting"
    IMPORT = "import"
    RENDEZVOUS = "rendezvous"
    ENGINE = "engine"
    LOAD = "load"
    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    EVALUATE = "evaluate"
    SAVE = "save"
    EXPORT = "export"
    DONE = "done"


@dataclass(frozen=True)
class Beat:
    """One look at a worker.

    Attributes:
        rank: the worker.
        step: optimizer steps completed.
        phase: what it does now.
        since: Unix time at which the phase began.
        metrics: the newest logged metrics (rank 0 only).
        max_steps: optimizer steps of the whole run, 0 until known.
        timeline: Unix time at which each start-up phase was first entered.
        notices: what a person should know, in the order in which it happened; a later look has all of an earlier one.
    """

    rank: int
    step: int
    phase: Phase
    since: float
    metrics: dict[str, Any]
    max_steps: int
    timeline: dict[str, float]
    notices: tuple[str, ...] = ()


class Heartbeat:
    """Written by the training thread, read by the thread that answers polls."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step = 0
        self.max_steps = 0
        self._phase = Phase.STARTING
        self._since = time.time()
        self.metrics: dict[str, Any] = {}
        self.timeline: dict[str, float] = {Phase.STARTING.value: self._since}
        self._notices: tuple[str, ...] = ()

    def enter(self, phase: Phase) -> None:
        """Say that a phase begins."""
        self._phase = phase
        self._since = time.time()
        self.timeline.setdefault(phase.value, self._since)

    def mark(self, name: str) -> None:
        """Note the first time at which something happened."""
        self.timeline.setdefault(name, time.time())

    def notify(self, text: str) -> None:
        """Say what a person should know; the driver shows it."""
        self._notices = (*self._notices, text)

    def read(self) -> Beat:
        """Return a snapshot; its fields may be from two neighbouring moments, which a reader can live with."""
        return Beat(
            rank=self.rank,
            step=self.step,
            phase=self._phase,
            since=self._since,
            metrics=dict(self.metrics),
            max_steps=self.max_steps,
            timeline=dict(self.timeline),
            notices=self._notices,
        )


@dataclass(frozen=True)
class WorkerContext:
    """One rank's place in the run.

    Attributes:
        run_directory: of the run, visible to all ranks.
        rank: 0 to world_size - 1, node by node.
        world_size: number of ranks.
        local_rank: index on its node.
        heartbeat: what others see of this rank.
        stop: set when the run should save and end at the next step boundary.
    """

    run_directory: RunDirectory
    rank: int
    world_size: int
    local_rank: int
    heartbeat: Heartbeat
    stop: threading.Event = field(default_factory=threading.Event)
