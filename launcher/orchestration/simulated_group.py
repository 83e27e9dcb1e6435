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
from launcher.orchestration.scenario import DAY, Scenario, VirtualClock
from launcher.orchestration.states import GroupStatus
from launcher.training.context import Beat, Phase

LOOK_S = 3600.0
"""A look at a healthy group takes at most so long: nothing happens in between that the supervisor would see."""
HANG_LOOK_S = 5.0


@dataclass
class _Attempt:
    """What an attempt has done, up to `at`.

    Work is measured in the seconds it takes on all nodes at full speed, from the newest checkpoint's step.
    """

    began: float
    at: float
    saved_step: int
    work: float
    next_keep: float
    ring: tuple[str, ...]
    trained: float = 0.0
    trained_before_save: float = 0.0
    trained_before_keep: float = 0.0
    saving: float = 0.0
    pauses: list[tuple[str, float]] = field(default_factory=list)
    slow_until: float = -1.0
    hung: str = ""
    stopping: bool = False


class KeptInMemory:
    """The newest state in memory: each node has its own part and that of the node before it, in a ring."""

    def __init__(self) -> None:
        self.step = 0
        self._ring: tuple[str, ...] = ()
        self._gone: set[int] = set()

    def keep(self, step: int, ring: tuple[str, ...]) -> None:
        """A state is whole on these nodes."""
        self.step, self._ring = step, ring
        self._gone.clear()

    def lose(self, node: str) -> None:
        """A node is gone; with its neighbour gone too since the state was kept, a part is in nobody's memory."""
        if not self.step or node not in self._ring:
            return
        index, size = self._ring.index(node), len(self._ring)
        self._gone.add(index)
        if size == 1 or {(index - 1) % size, (index + 1) % size} & self._gone:
            self.step = 0


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
        self._memory = KeptInMemory()
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
        now, saved = self.clock.now, self._saved_step
        work = max(0, self.kept_step() - saved) * self.scenario.step_seconds
        self._attempt = _Attempt(
            began=now, at=now, saved_step=saved, work=work, next_keep=math.inf, ring=tuple(self.used)
        )
        self._plan_keep(self._attempt)
        self._status = GroupStatus()

    def saved_step(self) -> int:
        """Step of the newest checkpoint."""
        return self._saved_step

    def kept_step(self) -> int:
        """Step of the newest state that is whole in the memory of the nodes, 0 without one."""
        return self._memory.step

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
        self._saved(attempt, self._step(attempt))
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
        now = min(until, max(attempt.at, attempt.began + self.scenario.start_seconds))
        while now < until:
            now += self._pause(attempt, until - now) if attempt.pauses else self._work(attempt, now, until)
        attempt.at = until

    def _work(self, attempt: _Attempt, now: float, until: float) -> float:
        """Make steps until something is to be saved or kept, the speed changes or the time is over; returns seconds."""
        scenario = self.scenario
        slow = now < attempt.slow_until
        speed = self.nodes / scenario.nodes / (scenario.slow_factor if slow else 1.0)
        interval = scenario.save_steps * scenario.step_seconds
        goal = min(interval, attempt.next_keep)
        stretch = min(until - now, (goal - attempt.work) / speed)
        if slow:
            stretch = min(stretch, attempt.slow_until - now)
        attempt.work = min(goal, attempt.work + stretch * speed)
        if goal - attempt.work < 1e-6:
            attempt.work = goal
            if goal == attempt.next_keep:
                attempt.pauses.append(("keep", scenario.memory_seconds))
            if goal == interval:
                attempt.pauses.append(("save", scenario.save_seconds))
        attempt.trained += stretch
        return stretch

    def _pause(self, attempt: _Attempt, most: float) -> float:
        """Save or keep for at most so long; returns seconds."""
        kind, left = attempt.pauses[0]
        stretch = min(most, left)
        attempt.saving += stretch
        if left - stretch > 1e-6:
            attempt.pauses[0] = kind, left - stretch
            return stretch
        attempt.pauses.pop(0)
        if kind == "save":
            self._saved(attempt, attempt.saved_step + self.scenario.save_steps)
        else:
            self._memory.keep(self._step(attempt), attempt.ring)
            attempt.trained_before_keep = attempt.trained
            self._plan_keep(attempt)
        return stretch

    def _saved(self, attempt: _Attempt, step: int) -> None:
        attempt.saved_step = self._saved_step = step
        attempt.work = 0.0
        attempt.pauses.clear()
        attempt.trained_before_save = attempt.trained
        self._plan_keep(attempt)

    def _plan_keep(self, attempt: _Attempt) -> None:
        """At which work the next state is kept: when the step is a multiple."""
        every = self.scenario.memory_steps
        if every is not None:
            following = (self._step(attempt) // every + 1) * every
            attempt.next_keep = (following - attempt.saved_step) * self.scenario.step_seconds

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
        self._memory.lose(node)
        self.used.remove(node)
        if self.scenario.spare_nodes is None:
            self.free.append(node)
        else:
            heapq.heappush(self.repairs, (self.clock.now + self.scenario.repair_hours * 3600, node))

    def _step(self, attempt: _Attempt) -> int:
        return attempt.saved_step + int(attempt.work / self.scenario.step_seconds + 1e-9)

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
            kept_step=self._memory.step,
            spent_before_keep={"forward": attempt.trained_before_keep},
        )
        beats = {0: beat}
        if attempt.hung:
            behind = {"rank": 1, "phase": Phase.BACKWARD if made else Phase.LOAD, "progress": 2 * made + 1}
            beats[1] = Beat(**{**beat.__dict__, **behind})
        return GroupStatus(beats, list(failures), results or {})
