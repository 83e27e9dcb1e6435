"""The state machine over a run's attempts. Pure: the worker group and the clock are passed in, so tests can step it."""

import math
import time
from collections.abc import Callable
from typing import Any

from launcher.errors import ResourceError
from launcher.orchestration.detection import Hang, HangDetector, Straggler, StragglerDetector
from launcher.orchestration.failure import (
    Failure,
    FailureKind,
    Verdict,
    classify,
    describe,
    first_cause,
)
from launcher.orchestration.policy import FailurePolicy, Incident, Retry
from launcher.orchestration.states import Group, GroupStatus, RunState
from launcher.training.context import Phase

ECHO_GRACE_S = 5.0
"""How long to wait for the cause when only echoes were heard; Ray reports a killed process within about a second, and
what ended with its raylet when a call to it fails."""
WAIT_INTERVAL_S = 0.5
"""Between two looks while a delay passes: a request to stop must not wait for it."""
NODES_INTERVAL_S = 5.0
"""Between two looks for nodes while some are missing."""


class Supervisor:
    """Brings a run to its end: starts attempts, watches them, restarts from the newest checkpoint.

    Args:
        group: the workers.
        policy: what to do about a failure.
        clock: seconds, monotonic.
        sleep: waits that many seconds.
        on_event: told every change: (state, facts).
        saved_step: of the newest checkpoint when the run begins.
        on_straggler: told of a rank that is slow.
        wall_clock: Unix time.
    """

    def __init__(
        self,
        group: Group,
        policy: FailurePolicy,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
        on_event: Callable[[RunState, dict[str, Any]], None],
        saved_step: int = 0,
        on_straggler: Callable[[Straggler], None] = lambda straggler: None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.group = group
        self.policy = policy
        self.clock = clock
        self.sleep = sleep
        self.on_event = on_event
        self.saved_step = saved_step
        self.on_straggler = on_straggler
        self.wall_clock = wall_clock
        self.state = RunState.STARTING
        self.attempt = 0
        self.status = GroupStatus()
        self.failure_text = ""
        self.cause: Failure | None = None
        self.verdict: Verdict | None = None
        self._hangs = HangDetector(policy.settings, group.node_of)
        self._stragglers = StragglerDetector(policy.settings, group.node_of)
        self._moving: Failure | None = None
        self._resize_to: int | None = None
        self._resized_at = -math.inf
        self._saved_at_start = saved_step
        self._stop_reason: str | None = None
        self._stop_by: float | None = None
        self._not_before = 0.0
        self._waiting_since: float | None = None

    def request_stop(self, reason: str = "asked to stop", grace_seconds: float | None = None) -> None:
        """Save and end at the next step boundary; safe to call from a signal handler.

        Args:
            reason: for people.
            grace_seconds: when the workers have not saved and ended by then, they are ended; what they had committed
                before stays.
        """
        if self._stop_reason is None:
            self._stop_reason = reason
        if grace_seconds is not None:
            deadline = self.clock() + grace_seconds
            self._stop_by = deadline if self._stop_by is None else min(self._stop_by, deadline)

    @property
    def stop_requested(self) -> bool:
        """Whether somebody asked to stop."""
        return self._stop_reason is not None

    def step(self) -> RunState:
        """Advance by one look at the group (or one start); returns the state afterwards."""
        if self.state.has_workers:
            self._watch()
        elif not self.state.is_final:
            self._start()
        return self.state

    def _enter(self, state: RunState, **facts: Any) -> None:
        self.state = state
        self.on_event(state, {"attempt": self.attempt, **facts})

    def _start(self) -> None:
        if self._stop_reason is not None:
            self._enter(RunState.STOPPED, reason=f"{self._stop_reason}, before the workers ran")
            return
        remaining = self._not_before - self.clock()
        if remaining > 0:
            self.sleep(min(WAIT_INTERVAL_S, remaining))
            return
        if self._lacks_nodes():
            return
        self.attempt += 1
        self.status = GroupStatus()
        self._hangs.reset()
        self._stragglers.reset()
        try:
            leaving = [self._moving.node] if self._moving is not None else []
            self.group.start(self.attempt, [*self.policy.excluded, *leaving])
        except ResourceError as error:
            # A first attempt that lacks something is the profile's mistake. A later one may have asked for a node that
            # is gone already, and is not known to be.
            if self.attempt == 1:
                raise
            self.attempt -= 1
            self._wait(1, str(error))
            return
        self._waiting_since = None
        self._moving = None
        self._saved_at_start = self.saved_step
        self._enter(RunState.RUNNING)

    def _lacks_nodes(self) -> bool:
        """Whether to start later; nodes that are missing are done without if the plan can be had for fewer."""
        missing = self.group.missing_nodes()
        if missing <= 0:
            return False
        size = self.group.best_size()
        if size is not None:
            self._resize(size, f"{missing} node(s) are missing")
            return False
        # A first attempt that lacks some is the profile's mistake, which the group will say.
        if self.attempt:
            self._wait(missing, f"{missing} node(s) are missing")
        return self.attempt > 0

    def _resize(self, nodes: int, why: str) -> None:
        before = self.group.nodes
        self.group.resize(nodes)
        self._resized_at = self.clock()
        self._resize_to = None
        self._enter(RunState.RESIZING, nodes=nodes, nodes_before=before, reason=why)

    def _wait(self, missing: int, why: str) -> None:
        """Wait a moment for nodes, or give up waiting."""
        if self._waiting_since is None:
            self._waiting_since = self.clock()
            self._enter(RunState.WAITING, missing_nodes=missing, reason=why)
        limit = self.policy.settings.wait_for_nodes_seconds
        if self.clock() - self._waiting_since >= limit:
            reason = f"{why}; waited fault_tolerance.wait_for_nodes_seconds {limit:g} for others"
            self._enter(RunState.FAILED, reason=reason)
        else:
            self.sleep(NODES_INTERVAL_S)

    def _watch(self) -> None:
        leaving = self._moving is not None or self._resize_to is not None
        if self._stop_reason is not None and (self.state is RunState.RUNNING or leaving):
            self._moving = self._resize_to = None
            self.group.request_stop()
            self._enter(RunState.DRAINING, reason=self._stop_reason)
        self.status = self.group.poll()
        self.saved_step = max([self.saved_step, *(beat.saved_step for beat in self.status.beats.values())])
        if self.status.failures:
            self._recover(self._await_cause())
        elif len(self.status.results) == self.group.world_size:
            self._end_attempt()
        elif (hang := self._hangs.look(self.clock(), self.status.beats)) is not None:
            self._recover([self._hung(hang)])
        elif self._stop_reason is not None:
            self._drain(self._stop_reason)
        else:
            self._look_around()

    def _end_attempt(self) -> None:
        """All ranks returned: the run is over, or it moves to other nodes."""
        result = self.status.results[0]
        if self._moving is not None and result["status"] == "stopped" and self._stop_reason is None:
            self._recover([self._moving])
            return
        self.group.stop()
        if self._resize_to is not None and result["status"] == "stopped" and self._stop_reason is None:
            self._resize(self._resize_to, "there are more nodes again")
            return
        final = RunState.COMPLETE if result["status"] == "complete" else RunState.STOPPED
        self._enter(final, step=result["step"], **({"reason": self._stop_reason} if self._stop_reason else {}))

    def _look_around(self) -> None:
        """What a healthy group has to be told, or a person about it."""
        for straggler in self._stragglers.look(self.status.beats):
            self.on_straggler(straggler)
        if self.status.leaving and self._moving is None:
            nodes, beat = ", ".join(self.status.leaving), self.status.beats.get(0)
            message = f"{nodes} is about to be taken away; the workers save and go on elsewhere"
            step, phase = (beat.step, beat.phase.value) if beat else (0, Phase.STARTING.value)
            self._moving = Failure(
                0, FailureKind.PREEMPTED, message, "", step, phase, self.wall_clock(), self.status.leaving[0]
            )
            self.group.request_stop()
            self._enter(RunState.DRAINING, reason=message)
        elif self._may_grow():
            self.group.request_stop()
            self._enter(RunState.DRAINING, reason=f"going on with {self._resize_to} nodes, {self.group.nodes} now")

    def _may_grow(self) -> bool:
        """Whether to go on with more nodes now: right after a save, and not more often than the recipe says."""
        interval = self.policy.settings.resize_interval_seconds
        saved = self.saved_step > self._saved_at_start
        if not saved or self._resize_to is not None or self.clock() - self._resized_at < interval:
            return False
        self._saved_at_start = self.saved_step
        size = self.group.best_size()
        if size is None or size <= self.group.nodes:
            return False
        self._resize_to = size
        return True

    def _hung(self, hang: Hang) -> Failure:
        first = hang.suspects[0]
        kept = self.group.examine(hang)
        message = f"{hang}\n{kept}" if kept else str(hang)
        return Failure(
            first.rank, FailureKind.HUNG, message, "", first.step, first.phase.value, self.wall_clock(), first.node
        )

    def _drain(self, reason: str) -> None:
        """See how far the workers are with saving, and end them when their time is over."""
        if self._stop_by is not None and self.clock() >= self._stop_by:
            self.group.stop()
            text = (
                f"{reason}; the workers did not save in time, the newest checkpoint is that of step {self.saved_step}"
            )
            self._enter(RunState.STOPPED, step=self.saved_step, reason=text)
        elif self.state is RunState.DRAINING and any(beat.phase is Phase.SAVE for beat in self.status.beats.values()):
            self._enter(RunState.SAVING)

    def _await_cause(self) -> list[Failure]:
        """Give the true cause a moment to arrive after its echoes."""
        deadline = self.clock() + ECHO_GRACE_S
        while all(failure.is_echo for failure in self.status.failures) and self.clock() < deadline:
            self.status = self.group.poll()
        return self.status.failures

    def _recover(self, failures: list[Failure]) -> None:
        cause = first_cause(failures)
        verdict = classify(cause)
        self.cause, self.verdict, self.failure_text = cause, verdict, describe(failures)
        noticed = self.clock()
        self._resize_to = None
        self.group.stop()
        self.saved_step = max(self.saved_step, self.group.saved_step())  # heartbeats are a look behind
        kept_step = self.group.kept_step()
        facts: dict[str, Any] = {
            "rank": cause.rank,
            "node": cause.node,
            "kind": cause.kind.value,
            "category": verdict.category.value,
            "evidence": verdict.evidence,
            "phase": cause.phase,
            "step": cause.step,
            "message": cause.message,
            "failed_at": cause.time,
            "saved_step": self.saved_step,
            **({"kept_step": kept_step} if kept_step > self.saved_step else {}),
            "teardown_seconds": round(self.clock() - noticed, 3),
        }
        if self._stop_reason is not None and cause.kind is not FailureKind.EXPECTED:
            text = f"a worker failed while the run was being stopped ({self._stop_reason})"
            # With a time to keep (a preemption), what is committed is what counts: the run can go on from there.
            self._enter(RunState.FAILED if self._stop_by is None else RunState.STOPPED, **facts, reason=text)
            return
        started = any("first_step" in beat.timeline for beat in self.status.beats.values())
        decision = self.policy.decide(Incident(cause, verdict, started, max(self.saved_step, kept_step)))
        if isinstance(decision, Retry):
            self._not_before = self.clock() + decision.delay_seconds
            self._enter(
                RunState.RECOVERING,
                **facts,
                restart=decision.number,
                budget=decision.budget,
                delay=decision.delay_seconds,
                **({"excluded": list(decision.exclude)} if decision.exclude else {}),
            )
        else:
            self._enter(RunState.FAILED, **facts, reason=decision.reason)
