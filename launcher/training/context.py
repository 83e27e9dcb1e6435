"""What a worker knows of itself, and what it lets others see of it while it trains. No torch here."""

import threading
import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from launcher.checkpoints.fault_plan import enact
from launcher.checkpoints.memory import HostMemory
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
    AGREE = "agree"
    """Waits for all ranks to say how many targets the global batch has; whoever is slow lets the others wait here."""
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    EVALUATE = "evaluate"
    SAVE = "save"
    EXPORT = "export"
    DONE = "done"


STEP_PHASES = (Phase.DATA, Phase.FORWARD, Phase.AGREE, Phase.BACKWARD, Phase.OPTIMIZER)
"""What an optimizer step consists of."""


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
        time: Unix time of the look, on the worker's clock.
        progress: grows with everything the worker gets done. All ranks of a group do the same things in the same order,
            so the rank with the least is the one that the others wait for.
        spent: seconds in each phase since the worker began, the current phase's till now.
        spent_before_save: the same at the moment when the newest checkpoint was committed.
        saved_step: step of the newest checkpoint that this worker committed or began with.
        first_step_seconds: what the first step took, with everything that happens only once.
        steps_made: optimizer steps that this worker has made itself.
        kept_step: step of the newest state that is kept in host memory, 0 without one.
        spent_before_keep: seconds in each phase when that was done.
        from_memory: step of the state in host memory that this worker began with; None: it began otherwise.
    """

    rank: int
    step: int
    phase: Phase
    since: float
    metrics: dict[str, Any]
    max_steps: int
    timeline: dict[str, float]
    notices: tuple[str, ...] = ()
    time: float = 0.0
    progress: int = 0
    spent: dict[str, float] = field(default_factory=dict)
    spent_before_save: dict[str, float] = field(default_factory=dict)
    saved_step: int = 0
    first_step_seconds: float = 0.0
    steps_made: int = 0
    kept_step: int = 0
    spent_before_keep: dict[str, float] = field(default_factory=dict)
    from_memory: int | None = None


class Heartbeat:
    """Written by the training thread, read by the thread that answers polls."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.step = 0
        self.max_steps = 0
        self.saved_step = 0
        self.metrics: dict[str, Any] = {}
        self._phase = Phase.STARTING
        self._since = time.time()
        self._entered = time.monotonic()
        self._spent: dict[str, float] = {}
        self._spent_before_save: dict[str, float] = {}
        self.kept_step = 0
        self.from_memory: int | None = None
        self._spent_before_keep: dict[str, float] = {}
        self._first_step_seconds = 0.0
        self._steps_made = 0
        self._progress = 0
        self._lock = threading.Lock()
        self.timeline: dict[str, float] = {Phase.STARTING.value: self._since}
        self._notices: tuple[str, ...] = ()

    def enter(self, phase: Phase) -> None:
        """Say that a phase begins."""
        with self._lock:
            now = time.monotonic()
            self._spent[self._phase.value] = self._spent.get(self._phase.value, 0.0) + now - self._entered
            self._phase, self._entered, self._since = phase, now, time.time()
            self._progress += 1
        self.timeline.setdefault(phase.value, self._since)
        enact(f"phase.{phase.value}", self.rank, self.step)

    def stepped(self, step: int) -> None:
        """Say that an optimizer step is complete."""
        self.step = step
        self._steps_made += 1
        if "first_step" not in self.timeline:
            spent = self._read_spent()
            self._first_step_seconds = sum(spent.get(phase.value, 0.0) for phase in STEP_PHASES)
        self.mark("first_step")

    def begun(self, step: int, max_steps: int, *, from_memory: bool) -> None:
        """Say where this worker begins: with a checkpoint, at the start, or with a state in memory."""
        self.step, self.max_steps = step, max_steps
        if from_memory:
            self.from_memory = step
            self.kept(step)
        else:
            self.saved(step)

    def saved(self, step: int) -> None:
        """Say that a checkpoint of this step is committed."""
        self.saved_step = step
        self._spent_before_save = self._read_spent()

    def kept(self, step: int) -> None:
        """Say that the state of this step is kept in host memory."""
        self.kept_step = step
        self._spent_before_keep = self._read_spent()

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
            time=time.time(),
            progress=self._progress,
            spent=self._read_spent(),
            spent_before_save=self._spent_before_save,
            saved_step=self.saved_step,
            first_step_seconds=self._first_step_seconds,
            steps_made=self._steps_made,
            kept_step=self.kept_step,
            spent_before_keep=self._spent_before_keep,
            from_memory=self.from_memory,
        )

    def _read_spent(self) -> dict[str, float]:
        with self._lock:
            spent = dict(self._spent)
            spent[self._phase.value] = spent.get(self._phase.value, 0.0) + time.monotonic() - self._entered
        return spent


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
        memory: where states are kept besides the disk; None: nowhere.
    """

    run_directory: RunDirectory
    rank: int
    world_size: int
    local_rank: int
    heartbeat: Heartbeat
    stop: threading.Event = field(default_factory=threading.Event)
    memory: HostMemory | None = None
