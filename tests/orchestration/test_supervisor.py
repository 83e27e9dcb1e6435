"""The supervisor's decisions, stepped: the group and the clock are scripted here; real workers stand in test_run.py."""

from dataclasses import dataclass, field
from typing import Any

from launcher.orchestration.failure import Failure, FailureKind, FailurePolicy, GiveUp, Retry, describe, first_cause
from launcher.orchestration.supervisor import GroupStatus, RunState, Supervisor

ECHO = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5432"


def failure(rank: int, message: str, *, time: float = 0.0, kind: FailureKind = FailureKind.EXCEPTION) -> Failure:
    return Failure(rank, kind, message, f"Traceback of rank {rank}\n", 7, "forward", time)


@dataclass
class ScriptedGroup:
    """Answers polls from a list; the last one repeats."""

    polls: list[GroupStatus]
    world_size: int = 2
    calls: list[str] = field(default_factory=list)
    clock: "Clock | None" = None

    def start(self, attempt: int) -> None:
        self.calls.append(f"start {attempt}")

    def poll(self) -> GroupStatus:
        if self.clock is not None:
            self.clock.now += 0.5
        return self.polls.pop(0) if len(self.polls) > 1 else self.polls[0]

    def request_stop(self) -> None:
        self.calls.append("request_stop")

    def stop(self) -> None:
        self.calls.append("stop")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def supervise(polls: list[GroupStatus], max_restarts: int = 3) -> tuple[Supervisor, ScriptedGroup, list[Any], Clock]:
    clock, events = Clock(), []
    group = ScriptedGroup(polls, clock=clock)
    policy = FailurePolicy(max_restarts)
    supervisor = Supervisor(group, policy, clock, clock.sleep, lambda state, facts: events.append((state, facts)))
    return supervisor, group, events, clock


def run(supervisor: Supervisor) -> RunState:
    for _ in range(100):
        if supervisor.step().is_final:
            return supervisor.state
    raise AssertionError("no end after 100 steps")


def results(status: str = "complete") -> dict[int, dict[str, Any]]:
    return {rank: {"status": status, "step": 10} for rank in (0, 1)}


def test_a_run_that_simply_completes() -> None:
    supervisor, group, events, _ = supervise([GroupStatus(), GroupStatus(results=results())])
    assert run(supervisor) is RunState.COMPLETE
    assert group.calls == ["start 1", "stop"]
    assert [state for state, _ in events] == [RunState.RUNNING, RunState.COMPLETE]


def test_one_rank_returning_is_not_the_end() -> None:
    half = {0: {"status": "complete", "step": 10}}
    supervisor, _, _, _ = supervise([GroupStatus(results=half), GroupStatus(results=results())])
    supervisor.step()
    assert supervisor.step() is RunState.RUNNING
    assert supervisor.step() is RunState.COMPLETE


def test_a_failed_attempt_is_ended_and_started_again() -> None:
    broken = GroupStatus(failures=[failure(1, "ValueError: no")])
    supervisor, group, events, clock = supervise([broken, GroupStatus(results=results())])
    assert run(supervisor) is RunState.COMPLETE
    assert group.calls == ["start 1", "stop", "start 2", "stop"]
    recovering = dict(events)[RunState.RECOVERING]
    assert (recovering["rank"], recovering["step"], recovering["restart"]) == (1, 7, 1)
    assert clock.slept == [0.0, 0.5]


def test_the_budget_of_restarts_ends() -> None:
    broken = GroupStatus(failures=[failure(1, "ValueError: no")])
    supervisor, group, events, clock = supervise([broken], max_restarts=2)
    assert run(supervisor) is RunState.FAILED
    assert group.calls == ["start 1", "stop", "start 2", "stop", "start 3", "stop"]
    assert "2 of fault_tolerance.max_restarts 2" in events[-1][1]["reason"]
    assert clock.slept == [0.0, 0.5, 1.0], "each restart waits longer"


def test_an_expected_error_is_not_retried() -> None:
    broken = GroupStatus(failures=[failure(0, "disk full", kind=FailureKind.EXPECTED)])
    supervisor, group, _, _ = supervise([broken])
    assert run(supervisor) is RunState.FAILED
    assert group.calls == ["start 1", "stop"]


def test_an_echo_waits_for_its_cause() -> None:
    echo = failure(0, ECHO, time=1.0)
    died = failure(1, "the worker's process is gone", time=2.0, kind=FailureKind.DIED)
    polls = [GroupStatus(failures=[echo]), GroupStatus(failures=[echo]), GroupStatus(failures=[echo, died])]
    supervisor, _, events, _ = supervise(polls, max_restarts=0)
    assert run(supervisor) is RunState.FAILED
    assert events[-1][1]["rank"] == 1
    assert supervisor.failure_text.splitlines()[0].startswith("rank 1 failed at step 7 in phase forward")


def test_echoes_alone_do_not_wait_for_ever() -> None:
    supervisor, _, _, clock = supervise([GroupStatus(failures=[failure(0, ECHO)])], max_restarts=0)
    assert run(supervisor) is RunState.FAILED
    assert clock.now < 5


def test_a_stop_request_reaches_the_workers_once() -> None:
    supervisor, group, _, _ = supervise([GroupStatus(), GroupStatus(), GroupStatus(results=results("stopped"))])
    supervisor.step()
    supervisor.request_stop()
    assert supervisor.step() is RunState.STOPPING
    assert run(supervisor) is RunState.STOPPED
    assert group.calls == ["start 1", "request_stop", "stop"]


def test_a_stop_request_before_the_start_starts_nothing() -> None:
    supervisor, group, _, _ = supervise([GroupStatus()])
    supervisor.request_stop()
    assert run(supervisor) is RunState.STOPPED
    assert group.calls == []


def test_a_failure_while_stopping_is_not_retried() -> None:
    supervisor, group, _, _ = supervise([GroupStatus(), GroupStatus(failures=[failure(1, "ValueError")])])
    supervisor.step()
    supervisor.request_stop()
    assert run(supervisor) is RunState.FAILED
    assert group.calls.count("start 1") == 1
    assert "start 2" not in group.calls


def test_the_first_cause_comes_before_echoes_and_later_failures() -> None:
    echo, early, late = failure(0, ECHO, time=0.0), failure(2, "KeyError", time=1.0), failure(1, "OSError", time=2.0)
    assert first_cause([echo, late, early]) is early
    text = describe([echo, late, early]).splitlines()
    assert text[0] == "rank 2 failed at step 7 in phase forward: KeyError"
    assert text[1] == "Traceback of rank 2"
    assert text[2].startswith("rank 0 then:")
    assert text[2].endswith("(follows from the first failure)")
    assert text[3] == "rank 1 then: OSError"


def test_the_policy_counts_and_gives_up() -> None:
    policy = FailurePolicy(max_restarts=7)
    delays = [policy.decide(failure(0, "x")) for _ in range(7)]
    assert delays == [Retry(n, min(0.5 * 2 ** (n - 1), 30.0)) for n in range(1, 8)]
    assert isinstance(policy.decide(failure(0, "x")), GiveUp)
