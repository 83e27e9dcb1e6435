"""A scripted worker group and a clock that is moved by hand, to step the supervisor with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from launcher.orchestration.detection import Hang
from launcher.orchestration.failure import Failure, FailureKind
from launcher.orchestration.policy import FailurePolicy
from launcher.orchestration.states import GroupStatus, RunState
from launcher.orchestration.supervisor import Supervisor
from launcher.recipe.run_sections import FaultToleranceSection
from launcher.training.context import Beat, Phase

ECHO = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5432"


def failure(
    rank: int,
    message: str,
    *,
    time: float = 0.0,
    kind: FailureKind = FailureKind.EXCEPTION,
    step: int = 7,
    node: str = "n1",
    exception: str = "",
) -> Failure:
    name = exception or ("" if kind is FailureKind.DIED else message.partition(":")[0])
    return Failure(rank, kind, message, f"Traceback of rank {rank}\n", step, "forward", time, node, name)


def died(rank: int = 1, *, node: str = "n1", time: float = 0.0) -> Failure:
    message = "the worker's process is gone: killed by signal 9"
    return failure(rank, message, kind=FailureKind.DIED, node=node, time=time)


def beat(
    rank: int = 0, *, step: int = 7, saved_step: int = 0, phase: Phase = Phase.FORWARD, stepped: bool = True
) -> Beat:
    timeline = {"first_step": 1.0} if stepped else {}
    return Beat(rank, step, phase, 0.0, {}, 100, timeline, saved_step=saved_step)


def results(status: str = "complete") -> dict[int, dict[str, Any]]:
    return {rank: {"status": status, "step": 10} for rank in (0, 1)}


COMPLETE = GroupStatus(results=results())


def broken(*failures: Failure, saved_step: int = 0, stepped: bool = True) -> GroupStatus:
    return GroupStatus({0: beat(saved_step=saved_step, stepped=stepped)}, list(failures))


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@dataclass
class ScriptedGroup:
    """Answers polls from a list; the last one repeats."""

    polls: list[GroupStatus]
    clock: Clock
    world_size: int = 2
    nodes: int = 3
    sizes: list[int | None] = field(default_factory=lambda: [None])
    calls: list[str] = field(default_factory=list)
    avoided: list[tuple[str, ...]] = field(default_factory=list)
    missing: list[int] = field(default_factory=list)
    starts: list[Exception | None] = field(default_factory=list)
    kept: int = 0

    def missing_nodes(self) -> int:
        return self.missing.pop(0) if self.missing else 0

    def best_size(self) -> int | None:
        return self.sizes.pop(0) if len(self.sizes) > 1 else self.sizes[0]

    def resize(self, nodes: int) -> None:
        self.calls.append(f"resize {nodes}")
        self.nodes = nodes

    def start(self, attempt: int, avoid: Sequence[str]) -> None:
        self.calls.append(f"start {attempt}")
        self.avoided.append(tuple(avoid))
        problem = self.starts.pop(0) if self.starts else None
        if problem is not None:
            raise problem

    def saved_step(self) -> int:
        return 0

    def kept_step(self) -> int:
        return self.kept

    def node_of(self, rank: int) -> str:
        return f"n{rank}"

    def examine(self, hang: Hang) -> str:
        self.calls.append("examine")
        return "stacks: here"

    def poll(self) -> GroupStatus:
        self.clock.now += 0.5
        return self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]

    def request_stop(self) -> None:
        self.calls.append("request_stop")

    def stop(self) -> None:
        self.calls.append("stop")


@dataclass
class Stepped:
    """A supervisor over a scripted group, with everything it said."""

    supervisor: Supervisor
    group: ScriptedGroup
    events: list[tuple[RunState, dict[str, Any]]]
    clock: Clock

    @classmethod
    def over(cls, *polls: GroupStatus, **settings: Any) -> "Stepped":
        clock, events = Clock(), []
        group = ScriptedGroup(list(polls), clock)
        policy = FailurePolicy(FaultToleranceSection(**settings), Random(0))
        supervisor = Supervisor(group, policy, clock, clock.sleep, lambda state, facts: events.append((state, facts)))
        return cls(supervisor, group, events, clock)

    def run(self) -> RunState:
        for _ in range(1000):
            if self.supervisor.step().is_final:
                return self.supervisor.state
        raise AssertionError("no end after 1000 steps")

    @property
    def states(self) -> list[RunState]:
        return [state for state, _ in self.events]

    def facts(self, state: RunState) -> list[dict[str, Any]]:
        return [facts for known, facts in self.events if known is state]
