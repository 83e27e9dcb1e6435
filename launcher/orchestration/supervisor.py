"""The state machine over a run's attempts. Pure: the worker group and the clock are passed in, so tests can step it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from launcher.orchestration.failure import Failure, FailureKind, FailurePolicy, Retry, describe, first_cause
from launcher.training.context import Beat

ECHO_GRACE_S = 2.0
"""How long to wait for the cause when only echoes were heard; Ray reports a killed process within about a second."""


class RunState(StrEnum):
    """Where a run is."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    RECOVERING = "recovering"
    COMPLETE = "complete"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        """Whether the run has ended."""
        return self in (RunState.COMPLETE, RunState.STOPPED, RunState.FAILED)


@dataclass(frozen=True)
class GroupStatus:
    """One look at a worker group.

    Attributes:
        beats: newest heartbeat by rank (ranks that did not answer yet are absent).
        failures: of the ranks that failed.
        results: of the ranks that returned, by rank: `TrainResult` as a mapping.
    """

    beats: dict[int, Beat] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    results: dict[int, dict[str, Any]] = field(default_factory=dict)


class Group(Protocol):
    """The workers of one attempt after another."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def start(self, attempt: int) -> None:
        """Start every rank; returns when their training threads run."""
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


class Supervisor:
    """Brings a run to its end: starts attempts, watches them, restarts from the newest checkpoint.

    Args:
        group: the workers.
        policy: what to do about a failure.
        clock: seconds, monotonic.
        sleep: waits that many seconds.
        on_event: told every change: (state, facts).
    """

    def __init__(
        self,
        group: Group,
        policy: FailurePolicy,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        on_event: Callable[[RunState, dict[str, Any]], None],
    ) -> None:
        self.group = group
        self.policy = policy
        self.clock = clock
        self.sleep = sleep
        self.on_event = on_event
        self.state = RunState.STARTING
        self.attempt = 0
        self.status = GroupStatus()
        self.failure_text = ""
        self.cause: Failure | None = None
        self._stop_requested = False
        self._retry_delay = 0.0

    def request_stop(self) -> None:
        """Save and end at the next step boundary; safe to call from a signal handler."""
        self._stop_requested = True

    def step(self) -> RunState:
        """Advance by one look at the group (or one start); returns the state afterwards."""
        if self.state in (RunState.STARTING, RunState.RECOVERING):
            self._start()
        elif self.state in (RunState.RUNNING, RunState.STOPPING):
            self._watch()
        return self.state

    def _enter(self, state: RunState, **facts: Any) -> None:
        self.state = state
        self.on_event(state, {"attempt": self.attempt, **facts})

    def _start(self) -> None:
        if self._stop_requested:
            self._enter(RunState.STOPPED, reason="asked to stop before the workers ran")
            return
        self.sleep(self._retry_delay)
        self.attempt += 1
        self.status = GroupStatus()
        self.group.start(self.attempt)
        self._enter(RunState.RUNNING)

    def _watch(self) -> None:
        if self._stop_requested and self.state is RunState.RUNNING:
            self.group.request_stop()
            self._enter(RunState.STOPPING)
        self.status = self.group.poll()
        if self.status.failures:
            self._recover(self._await_cause())
        elif len(self.status.results) == self.group.world_size:
            result = self.status.results[0]
            self.group.stop()
            final = RunState.COMPLETE if result["status"] == "complete" else RunState.STOPPED
            self._enter(final, step=result["step"])

    def _await_cause(self) -> list[Failure]:
        """Give the true cause a moment to arrive after its echoes."""
        deadline = self.clock() + ECHO_GRACE_S
        while all(failure.is_echo for failure in self.status.failures) and self.clock() < deadline:
            self.status = self.group.poll()
        return self.status.failures

    def _recover(self, failures: list[Failure]) -> None:
        cause = first_cause(failures)
        self.cause, self.failure_text = cause, describe(failures)
        self.group.stop()
        facts = {"rank": cause.rank, "kind": cause.kind.value, "step": cause.step, "message": cause.message}
        if self._stop_requested and cause.kind is not FailureKind.EXPECTED:
            self._enter(RunState.FAILED, **facts, reason="a worker failed while the run was being stopped")
            return
        decision = self.policy.decide(cause)
        if isinstance(decision, Retry):
            self._retry_delay = decision.delay_seconds
            self._enter(RunState.RECOVERING, **facts, restart=decision.number, delay=decision.delay_seconds)
        else:
            self._enter(RunState.FAILED, **facts, reason=decision.reason)
