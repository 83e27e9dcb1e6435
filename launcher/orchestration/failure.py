"""What went wrong in a worker group: facts, what they mean, and how they are told. Pure: no ray, no torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from launcher.errors import BadLossesError

ECHO = re.compile(
    r"Connection (closed|reset) by peer|Broken pipe|Read error|Socket (closed|Timeout)"
    r"|remote process exited|NCCL .*remote error",
)
"""What a rank says when another one is gone: gloo's `transport/tcp/pair.cc` and NCCL's proxy."""


TOO_MANY_BAD_LOSSES = BadLossesError.__name__
"""Exception of a worker that has left out as many batches as it may."""


class FailureKind(StrEnum):
    """How a worker failed."""

    EXPECTED = "expected"
    """An error that the user can act on; restarting would meet it again."""
    EXCEPTION = "exception"
    """Any other exception in training."""
    DIED = "died"
    """The worker's process is gone (killed, out of memory, node lost)."""
    HUNG = "hung"
    """The worker made no progress and was ended by the supervisor."""
    PREEMPTED = "preempted"
    """Its node was taken away, and that was announced."""


class Category(StrEnum):
    """What a failure means; each has its own treatment in `FailurePolicy`."""

    USER = "user error"
    ERROR = "error"
    """An exception that says nothing about machines: tried again once, a user error when it repeats."""
    INFRASTRUCTURE = "infrastructure"
    HANG = "hang"
    NUMERIC = "numeric"
    PREEMPTION = "preemption"
    STORAGE = "storage"


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
        node: host name of its node, empty when unknown.
        exception: class name of the exception, empty when its process died.
    """

    rank: int
    kind: FailureKind
    message: str
    traceback: str
    step: int
    phase: str
    time: float
    node: str = ""
    exception: str = ""

    @property
    def is_echo(self) -> bool:
        """Whether this only says that another rank is gone."""
        return self.kind is FailureKind.EXCEPTION and ECHO.search(self.message) is not None

    @property
    def signature(self) -> str:
        """The same for two failures that only differ in addresses, counts and times."""
        return f"{self.exception}: {re.sub(r'(0x[0-9a-f]+|[0-9]+)', '#', self.message)}"


@dataclass(frozen=True)
class Verdict:
    """What a failure means, and what in it says so."""

    category: Category
    evidence: str


PATTERNS: Sequence[tuple[Category, str, str]] = (
    (Category.PREEMPTION, r"preempt|node .*drain", "its node was taken away"),
    (Category.INFRASTRUCTURE, r"out of memory \(OOM\)|low on memory|oom.?kill", "out of host memory"),
    (Category.INFRASTRUCTURE, r"MemoryError|[Cc]an(no|')t allocate memory", "out of host memory"),
    (Category.INFRASTRUCTURE, r"ECC|Xid|CUDA error: (unspecified launch|device.*lost|uncorrect)", "a GPU is broken"),
    (Category.INFRASTRUCTURE, r"NCCL error|ncclSystemError|ncclUnhandledCudaError", "NCCL failed"),
    (Category.HANG, r"Timed out waiting \d+ms for|collective operation timeout|Watchdog caught", "a collective hung"),
    (Category.STORAGE, r"\[Errno (5|28|30|116|122)\]|Stale file handle", "the file system failed"),
    (Category.INFRASTRUCTURE, r"ConnectionError|Connection refused|No route to host|Name or service", "no connection"),
)
"""Category, what its message looks like, what that means; the first that fits decides."""


def classify(failure: Failure) -> Verdict:
    """Say what a failure means; the evidence quotes what it rests on."""
    if failure.kind is FailureKind.HUNG:
        return Verdict(Category.HANG, failure.message)
    if failure.kind is FailureKind.PREEMPTED:
        return Verdict(Category.PREEMPTION, f"its node was taken away: {failure.message}")
    if failure.exception in ("NumericError", TOO_MANY_BAD_LOSSES):
        return Verdict(Category.NUMERIC, failure.message)
    if failure.kind is FailureKind.EXPECTED:
        storage = failure.exception in ("StorageError", "OSError")
        return Verdict(Category.STORAGE if storage else Category.USER, failure.message)
    if failure.is_echo:
        return Verdict(Category.INFRASTRUCTURE, f"another rank's connection ended: {failure.message}")
    for category, pattern, meaning in PATTERNS:
        found = re.search(pattern, failure.message)
        if found is not None:
            return Verdict(category, f"{meaning}: “{found.group()}” in “{failure.message}”")
    if failure.kind is FailureKind.DIED:
        return Verdict(Category.INFRASTRUCTURE, failure.message)
    return Verdict(Category.ERROR, failure.message)


def first_cause(failures: Sequence[Failure]) -> Failure:
    """The failure that the others follow from: a real one before echoes, then the earliest."""
    return min(failures, key=lambda failure: (failure.is_echo, failure.time))


def describe(failures: Sequence[Failure]) -> str:
    """Text for people: the first cause in full, then the echoes, a line each."""
    cause = first_cause(failures)
    where = f" on {cause.node}" if cause.node else ""
    lines = [f"rank {cause.rank}{where} failed at step {cause.step} in phase {cause.phase}: {cause.message}"]
    if cause.kind is FailureKind.HUNG:
        lines = [cause.message]
    if cause.traceback:
        lines.append(cause.traceback.rstrip())
    for other in sorted(failures, key=lambda failure: failure.rank):
        if other is not cause:
            note = " (follows from the first failure)" if other.is_echo else ""
            lines.append(
                f"rank {other.rank} then: {other.message.splitlines()[0] if other.message else other.kind}{note}"
            )
    return "\n".join(lines)
