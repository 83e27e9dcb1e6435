"""One driver at a time on a run directory: two would overwrite each other's checkpoints."""

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from launcher.errors import RunDirectoryError
from launcher.run_directory import RunDirectory


@dataclass(frozen=True)
class Holder:
    """Who holds a run directory.

    Attributes:
        host: its name.
        pid: of the driver there.
        started: Unix time at which that process began; a later process with the same pid is another one.
        since: Unix time at which it took the directory.
        job: id of its Slurm job, if it runs in one. A requeued job keeps its id, and its former self is gone.
        command: its command line.
    """

    host: str
    pid: int
    started: float
    since: float
    job: str | None
    command: str

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            started=psutil.Process().create_time(),
            since=time.time(),
            job=os.environ.get("SLURM_JOB_ID"),
            command=shlex.join(sys.argv),
        )

    @property
    def is_gone(self) -> bool | None:
        """Whether it has ended; None when that cannot be known from here."""
        if self.job is not None and self.job == os.environ.get("SLURM_JOB_ID"):
            return not self._runs_here() if self.host == socket.gethostname() else True
        return not self._runs_here() if self.host == socket.gethostname() else None

    def _runs_here(self) -> bool:
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        except psutil.NoSuchProcess:
            return False

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}{job}, since {since}: {self.command}"


@contextmanager
def holding(run_directory: RunDirectory) -> Iterator[None]:
    """Hold a run directory for the time of the block.

    The kernel's lock on the file tells apart the living and the dead on one machine, and on file systems that share
    locks; who holds it stands in the file, for people and for the other machines.

    Raises:
        RunDirectoryError: another process holds it, or one on another machine that may be dead; the text says which.
    """
    path = run_directory.lock
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RunDirectoryError(
            f"run directory {run_directory.path} cannot be written: {error.strerror or error}; "
            "name another one with --run-dir"
        ) from error
    try:
        _take(path, descriptor)
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def is_held(run_directory: RunDirectory) -> bool:
    """Whether a run is at work in a directory, as far as can be known from here."""
    try:
        descriptor = os.open(run_directory.lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        holder = _read(descriptor)
    finally:
        os.close(descriptor)
    return holder is not None and holder.is_gone is not True


def _take(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RunDirectoryError(f"{_held(path, _read(descriptor))}\n{_WAIT}") from None
    except OSError:
        pass  # a file system without locks: what stands in the file decides
    holder = _read(descriptor)
    gone = True if holder is None else holder.is_gone
    if gone is False:
        raise RunDirectoryError(f"{_held(path, holder)}\n{_WAIT}")
    if gone is None:
        raise RunDirectoryError(
            f"{_held(path, holder)}\nThat is another machine, and this one cannot see whether the process still runs. "
            f"If it is dead, take the run directory with: rm {shlex.quote(str(path))}"
        )
    content = json.dumps(asdict(Holder.here())).encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)
    os.fsync(descriptor)


_WAIT = "Wait for it to end, stop it, or name another directory with --run-dir."


def _held(path: Path, holder: Holder | None) -> str:
    return f"run directory {path.parent} is in use by {holder or 'another process, which is just starting'}"


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, 65536, 0)))
    except (ValueError, TypeError):
        return None
