"""A worker group that only exists on paper: it trains, saves, fails and comes back on a virtual clock. Pure.

The supervisor and the failure policy over it are the real ones.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from launcher.orchestration.detection import Hang
from launcher.orchestration.failure import Failure, FailureKind
from launcher.orchestration.states import GroupStatus
from launcher.training.context import Beat, Phase

DAY = 86_400.0
LOOK_S = 3600.0
"""A look at a healthy group takes at most so long: nothing happens in between that the supervisor would see."""
HANG_LOOK_S = 5.0


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
class _Attempt:
    """What an attempt has done, up to `at`."""

    began: float
    first_step: int
    at: float
    trained: float = 0.0
    trained_before_save: float = 0.0
    saving: float = 0.0
    in_interval: float = 0.0
    in_save: float = 0.0
    saved_step: int = 0
    slow_until: float = -1.0
    hung: str = ""
    stopping: bool = False


class SimulatedGroup:
    """The `Group` that the supervisor is given; one heartbeat stands for all ranks, a second one for a hung rank.

    Args:
        scenario: what to simulate.
        clock: moved by every look.
    """

    world_size = 1

    def __init__(self, scenario: Scenario, clock: VirtualClock) -> None:
        self.scenario = scenario
        self.clock = clock
        self.random = Random(scenario.seed)  # noqa: S311 - dice, not keys
        self.end = scenario.days * DAY
        spares = scenario.spare_nodes or 0
        self.free = [f"n{index}" for index in range(scenario.nodes + spares)]
        self.used: list[str] = []
        self.nodes = scenario.nodes
        self.repairs: list[tuple[float, str]] = []
        self.failures = 0
        self._saved_step = 0
        self._attempt: _Attempt | None = None
        self._status = GroupStatus()

    def missing_nodes(self) -> int:
        """How many nodes fewer there are than the group needs."""
        self._repair()
        return max(0, self.nodes - len(self.free) - len(self.used))

    def best_size(self) -> int | None:
        """As many nodes as there are; None when that is too few, or the run is not elastic."""
        if self.scenario.min_nodes is None:
            return None
        self._repair()
        there = min(self.scenario.nodes, len(self.free) + len(self.used))
        return there if there >= self.scenario.min_nodes else None

    def resize(self, nodes: int) -> None:
        """Start on so many nodes from now on."""
        self.nodes = nodes
        self.free += self.used[nodes:]
        self.used = self.used[:nodes]

    def _repair(self) -> None:
        while self.repairs and self.repairs[0][0] <= self.clock.now:
            self.free.append(heapq.heappop(self.repairs)[1])

    def start(self, attempt: int, avoid: Sequence[str]) -> None:
        """Take nodes and begin."""
        self._repair()
        avoided = set(avoid)
        good = [node for node in self.free if node not in avoided]
        for node in avoided.intersection(self.used):
            if good:
                self.used[self.used.index(node)] = good[-1]
                self.free[self.free.index(good.pop())] = node
        wanted = self.nodes - len(self.used)
        taken = [*good, *(node for node in self.free if node in avoided)][:wanted]
        self.used += taken
        gone = set(taken)
        self.free = [node for node in self.free if node not in gone]
        now = self.clock.now
        self._attempt = _Attempt(began=now, first_step=self._saved_step, at=now, saved_step=self._saved_step)
        self._status = GroupStatus()

    def saved_step(self) -> int:
        """Step of the newest checkpoint."""
        return self._saved_step

    def kept_step(self) -> int:
        """Nothing is kept in memory here."""
        return 0

    def node_of(self, rank: int) -> str:
        """Name of the node of the first rank, or of the hung one."""
        return self._attempt.hung if self._attempt and rank == 1 and self._attempt.hung else "n0"

    def examine(self, hang: Hang) -> str:
        """Lose the hung node."""
        if self._attempt is not None and self._attempt.hung:
            self._lose(self._attempt.hung)
        return ""

    def request_stop(self) -> None:
        """Save, and end at the next look."""
        if self._attempt is not None:
            self._attempt.stopping = True

    def stop(self) -> None:
        """End the attempt."""
        if self._attempt is not None:
            self.clock.now += self.scenario.teardown_seconds
            self._attempt = None

    def poll(self) -> GroupStatus:
        """Let time pass until something happens."""
        attempt = self._attempt
        if attempt is None:
            raise RuntimeError("a group that was not started is looked at")
        if attempt.hung:
            self.clock.now = min(self.end, self.clock.now + HANG_LOOK_S)
            return self._look(attempt)
        if attempt.stopping:
            return self._stop(attempt)
        until = min(self.end, attempt.at + self._look_seconds())
        kind, moment = self._next_trouble(attempt.at)
        self._train(attempt, min(until, moment))
        self.clock.now = attempt.at
        if attempt.at >= self.end:
            return self._look(attempt, {0: {"status": "complete", "step": self._step(attempt)}})
        if moment > until:
            return self._look(attempt)
        return self._trouble(attempt, kind)

    def _look_seconds(self) -> float:
        """A run that may grow is looked at after every save."""
        scenario = self.scenario
        if self.nodes == scenario.nodes:
            return LOOK_S
        return min(LOOK_S, scenario.save_steps * scenario.step_seconds * scenario.nodes / self.nodes)

    def _stop(self, attempt: _Attempt) -> GroupStatus:
        """Save at once, and end."""
        self.clock.now = attempt.at = min(self.end, attempt.at + self.scenario.save_seconds)
        attempt.saving += self.scenario.save_seconds
        attempt.saved_step = self._saved_step = self._step(attempt)
        attempt.in_interval = attempt.in_save = 0.0
        attempt.trained_before_save = attempt.trained
        return self._look(attempt, {0: {"status": "stopped", "step": attempt.saved_step}})

    def _next_trouble(self, now: float) -> tuple[str, float]:
        """What happens next to one of the nodes, and when. Exponential times have no memory, so each look may draw."""
        scenario = self.scenario
        rates = {
            "failure": self.nodes / (scenario.mtbf_node_days * DAY),
            "preemption": self.nodes * scenario.preemptions_per_node_day / DAY,
            "slow": self.nodes / (scenario.slow_node_days * DAY) if scenario.slow_node_days else 0.0,
        }
        moments = {kind: now + self.random.expovariate(rate) for kind, rate in rates.items() if rate > 0}
        kind = min(moments, key=lambda name: moments[name])
        return kind, moments[kind]

    def _train(self, attempt: _Attempt, until: float) -> None:
        """Start up, train and save until a moment."""
        scenario = self.scenario
        ready = attempt.began + scenario.start_seconds
        now = min(until, max(attempt.at, ready))
        interval = scenario.save_steps * scenario.step_seconds
        while now < until:
            if attempt.in_interval < interval:
                slow = now < attempt.slow_until
                speed = self.nodes / scenario.nodes / (scenario.slow_factor if slow else 1.0)
                stretch = min(until - now, (interval - attempt.in_interval) / speed)
                if slow:
                    stretch = min(stretch, attempt.slow_until - now)
                attempt.in_interval = min(interval, attempt.in_interval + stretch * speed)
                if interval - attempt.in_interval < 1e-6:
                    attempt.in_interval = interval
                attempt.trained += stretch
                now += stretch
            else:
                stretch = min(until - now, scenario.save_seconds - attempt.in_save)
                attempt.in_save += stretch
                attempt.saving += stretch
                now += stretch
                if attempt.in_save >= scenario.save_seconds - 1e-6:
                    attempt.in_interval = attempt.in_save = 0.0
                    attempt.saved_step += scenario.save_steps
                    attempt.trained_before_save = attempt.trained
                    self._saved_step = attempt.saved_step
        attempt.at = until

    def _trouble(self, attempt: _Attempt, kind: str) -> GroupStatus:
        if kind == "slow":
            attempt.slow_until = attempt.at + self.scenario.slow_hours * 3600
            return self._look(attempt)
        node = self.used[self.random.randrange(len(self.used))]
        if kind == "failure":
            self.failures += 1
            if self.random.random() < self.scenario.hang_share:
                attempt.hung = node
                return self._look(attempt)
        self.clock.now += self.scenario.detect_seconds
        self._lose(node)
        preempted = kind == "preemption"
        failure = Failure(
            rank=0,
            kind=FailureKind.PREEMPTED if preempted else FailureKind.DIED,
            message="the node was taken away" if preempted else "the worker's process is gone: its node died",
            traceback="",
            step=self._step(attempt),
            phase="forward",
            time=attempt.at,
            node=node,
        )
        return self._look(attempt, failures=[failure])

    def _lose(self, node: str) -> None:
        """A node goes to repair; with spares without end, another one comes at once."""
        self.used.remove(node)
        if self.scenario.spare_nodes is None:
            self.free.append(node)
        else:
            heapq.heappush(self.repairs, (self.clock.now + self.scenario.repair_hours * 3600, node))

    def _step(self, attempt: _Attempt) -> int:
        return attempt.saved_step + int(attempt.in_interval / self.scenario.step_seconds)

    def _look(
        self, attempt: _Attempt, results: dict[int, dict[str, Any]] | None = None, failures: Sequence[Failure] = ()
    ) -> GroupStatus:
        step = self._step(attempt)
        made = math.floor(attempt.trained / self.scenario.step_seconds)
        starting = min(self.scenario.start_seconds, attempt.at - attempt.began)
        beat = Beat(
            rank=0,
            step=step,
            phase=Phase.AGREE if made else Phase.LOAD,
            since=attempt.at,
            metrics={},
            max_steps=0,
            timeline={"first_step": attempt.began} if made else {},
            time=self.clock.now,
            progress=2 * made + 2,
            spent={"load": starting, "forward": attempt.trained, "save": attempt.saving},
            spent_before_save={"forward": attempt.trained_before_save},
            saved_step=attempt.saved_step,
            first_step_seconds=self.scenario.step_seconds if made else 0.0,
            steps_made=made,
        )
        beats = {0: beat}
        if attempt.hung:
            behind = {"rank": 1, "phase": Phase.BACKWARD if made else Phase.LOAD, "progress": 2 * made + 1}
            beats[1] = Beat(**{**beat.__dict__, **behind})
        return GroupStatus(beats, list(failures), results or {})


@dataclass
class Recorder:
    """Keeps the supervisor's events as the driver's journal would write them, on the virtual clock."""

    clock: VirtualClock
    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, state: str, facts: dict[str, Any], **more: Any) -> None:
        """Keep an event."""
        self.events.append({"time": self.clock.now, "state": state, **facts, **more})
