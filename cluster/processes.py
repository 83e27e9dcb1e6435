"""Processes: which one a pid means, and how a tree of them is ended."""

import ctypes
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

STOP_GRACE_S = 1.0
"""Between SIGTERM and SIGKILL. Ray's own processes have nothing to save, and its raylet takes many seconds to drain."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class ProcessIdentity:
    """One process for all time: a pid is given to another process sooner or later, these three together are not.

    Attributes:
        boot_id: of the machine's running kernel.
        pid: process id.
        start_ticks: clock ticks from boot to the process's start, as in `/proc/PID/stat`.
    """

    boot_id: str
    pid: int
    start_ticks: int

    def __str__(self) -> str:
        return f"{self.boot_id}/{self.pid}/{self.start_ticks}"

    @classmethod
    def parse(cls, text: str) -> "ProcessIdentity":
        """Read what `str` wrote.

        Raises:
            ValueError: it is something else.
        """
        boot_id, pid, start_ticks = text.split("/")
        return cls(boot_id, int(pid), int(start_ticks))

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity":
        """The identity of a living process.

        Raises:
            ProcessLookupError: there is none of this pid, or it has ended and is only waited for.
        """
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError) as error:
            raise ProcessLookupError(f"no process {pid}") from error
        return cls.from_stat(_BOOT_ID.read_text(), stat)

    @classmethod
    def from_stat(cls, boot_id: str, stat: str) -> "ProcessIdentity":
        """Make it from the contents of `boot_id` and `/proc/PID/stat` (proc(5)), which may come from another machine.

        Raises:
            ProcessLookupError: the process has ended and is only waited for.
        """
        pid, _, rest = stat.partition(" (")
        fields = rest.rpartition(")")[2].split()  # the name in parentheses may hold anything, parentheses too
        if fields[0] in ("Z", "X"):
            raise ProcessLookupError(f"process {pid} has ended")
        return cls(boot_id.strip(), int(pid), int(fields[19]))

    @property
    def is_alive(self) -> bool:
        """Whether this very process runs on this machine."""
        try:
            return ProcessIdentity.of(self.pid) == self
        except ProcessLookupError:
            return False

    def send(self, number: signal.Signals) -> bool:
        """Signal this very process; returns whether it was there."""
        if not self.is_alive:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def end_with_parent() -> None:
    """Have the kernel send SIGTERM to this process when the one that started it dies, however it dies."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def prepare_child() -> None:
    """What a job's child process does first: end with the process that started it, and ignore Slurm's warning.

    Where Slurm has no cgroups, the warning goes to every process of a job and would end those that do not know it.
    """
    end_with_parent()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def adopt_orphans() -> None:
    """Become the parent of what this process's descendants leave behind, so that `end_descendants` finds it."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything it started, by pid: SIGTERM, then SIGKILL for what is left."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    _end(tree)
    process.wait(timeout=10)


def end_descendants() -> None:
    """End everything that this process started and, after `adopt_orphans`, what that left behind."""
    deadline = time.monotonic() + 10
    while (tree := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
        _end(tree)


def _end(tree: list[psutil.Process]) -> None:
    for member in tree:
        _signal(member, signal.SIGTERM)
    _, alive = psutil.wait_procs(tree, timeout=STOP_GRACE_S)
    for member in alive:
        _signal(member, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=10)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
