"""What went wrong in a worker group, and what to do about it. Pure: no ray, no torch."""

import re
from dataclasses import dataclass
from enum import StrEnum

ECHO = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Read error|Socket (closed|Timeout)"
    r"|remote process exited|NCCL .*remote error",
)
"""What a rank says when another one is gone: gloo's `transport/tcp/pair.cc` and NCCL's proxy."""


class FailureKind(StrEnum):
    """How a worker failed."""

    EXPECTED = "expected"
    """An error that the user can act on; restarting would meet it again."""
    EXCEPTION = "exception"
    """Any other exception in training."""
    DIED = "died"
    """The worker's process is gone (killed, out of memory, node lost)."""


@dataclass(frozen=True)
class Failure:
    """One worker's failure.

    Attributes:
        rank: of the worker.
        kind: how it failed.
        message: one line.
        traceback: the worker's own, empty when its process died.
        step: optimizer steps it had completed.
        phase: what it was doing.
        time: Unix time.
    """

    rank: int
    kind: FailureKind
    message: str
    traceback: str
    step: int
    phase: str
    time: float

    @property
    def is_echo(self) -> bool:
        """Whether this only says that another rank is gone."""
        return self.kind is FailureKind.EXCEPTION and ECHO.search(self.message) is not None


def first_cause(failures: list[Failure]) -> Failure:
    """The failure that the others follow from: a real one before echoes, then the earliest."""
    return min(failures, key=lambda failure: (failure.is_echo, failure.time))


def describe(failures: list[Failure]) -> str:
    """Text for people: the first cause in full, then the echoes, a line each."""
    cause = first_cause(failures)
    lines = [f"rank {cause.rank} failed at step {cause.step} in phase {cause.phase}: {cause.message}"]
    if cause.traceback:
        lines.append(cause.traceback.rstrip())
    for other in sorted(failures, key=lambda failure: failure.rank):
        if other is not cause:
            note = " (follows from the first failure)" if other.is_echo else ""
            lines.append(
                f"rank {other.rank} then: {other.message.splitlines()[0] if other.message else other.kind}{note}"
            )
    return "\n".join(lines)


@dataclass(frozen=True)
class Retry:
    """Start the worker group again from the newest checkpoint."""

    number: int
    delay_seconds: float


@dataclass(frozen=True)
class GiveUp:
    """End the run as failed."""

    reason: str


@dataclass
class FailurePolicy:
    """Decides between another attempt and giving up.

    Attributes:
        max_restarts: of the recipe.
        restarts: made so far.
    """

    max_restarts: int
    restarts: int = 0

    def decide(self, failure: Failure) -> Retry | GiveUp:
        """Decide on the first cause of an attempt's end."""
        if failure.kind is FailureKind.EXPECTED:
            return GiveUp("restarting would meet the same error")
        if self.restarts >= self.max_restarts:
            return GiveUp(f"{self.restarts} of fault_tolerance.max_restarts {self.max_restarts} restarts are used up")
        self.restarts += 1
        return Retry(self.restarts, delay_seconds=min(0.5 * 2 ** (self.restarts - 1), 30.0))
