"""The run directory: the contract between CLI, driver and workers. Every path in it is named here and nowhere else."""

import errno
import hashlib
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RunDirectoryError

ATTEMPT_MARK = "=== attempt of"
"""Begins the line in a rank's log with which each attempt begins."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside one run's directory.

    Attributes:
        path: absolute path of the directory.
    """

    path: Path

    @classmethod
    def at(cls, path: str | Path) -> "RunDirectory":
        """The run directory at a path, made absolute."""
        return cls(Path(path).expanduser().absolute())

    @property
    def recipe(self) -> Path:
        """The resolved recipe (YAML), without secrets."""
        return self.path / "recipe.yaml"

    @property
    def plan(self) -> Path:
        """The plan (JSON): what the driver and the workers obey."""
        return self.path / "plan.json"

    @property
    def full_plan(self) -> Path:
        """The plan at full size (JSON) of an elastic run that goes on with fewer nodes; absent otherwise."""
        return self.path / "full_plan.json"

    @property
    def deepspeed(self) -> Path:
        """The exact DeepSpeed config (JSON), for people and for replaying by hand."""
        return self.path / "deepspeed.json"

    @property
    def lock(self) -> Path:
        """Who drives the run now (JSON); empty or absent when nobody does."""
        return self.path / "run.lock"

    @property
    def profile(self) -> Path:
        """What torch's profiler recorded, a file a rank and window."""
        return self.path / "profile"

    @property
    def saves(self) -> Path:
        """One JSON object a save: step, reason, whether it succeeded, seconds, and for how many training waited."""
        return self.path / "saves.jsonl"

    @property
    def save_request(self) -> Path:
        """Somebody asks for a checkpoint now (JSON); rank 0 removes it when it has answered."""
        return self.path / "save.request"

    @property
    def save_answer(self) -> Path:
        """What became of the last request (JSON)."""
        return self.path / "save.answer"

    @property
    def data(self) -> Path:
        """Where the prepared data is (JSON: directory, fingerprint)."""
        return self.path / "data.json"

    @property
    def attempts(self) -> Path:
        """One JSON object a worker group: when it started and ended, and why."""
        return self.path / "attempts.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object a state change of the run, with its time."""
        return self.path / "events.jsonl"

    @property
    def ledger(self) -> Path:
        """What the running attempt has spent its time on (JSON), replaced every few seconds."""
        return self.path / "ledger.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a logged step or evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def skipped(self) -> Path:
        """One JSON object a range of samples that is left out because their loss was bad."""
        return self.path / "skipped.jsonl"

    @property
    def progress(self) -> Path:
        """How far the running job is (JSON), replaced about once a second."""
        return self.path / "progress.json"

    @property
    def jobs(self) -> Path:
        """Folder of the jobs that were submitted for this run, `0001/` each."""
        return self.path / "jobs"

    @property
    def provenance(self) -> Path:
        """What ran (JSON): versions, git revision, packages, profile; without secrets."""
        return self.path / "provenance.json"

    @property
    def summary(self) -> Path:
        """Facts of a completed run (JSON); exists only once the run is complete."""
        return self.path / "summary.json"

    @property
    def logs(self) -> Path:
        """Folder of the driver's and the ranks' logs."""
        return self.path / "logs"

    @property
    def driver_log(self) -> Path:
        """The driver's log."""
        return self.logs / "driver.log"

    def rank_log(self, rank: int) -> Path:
        """The log of one rank, appended to over attempts."""
        return self.logs / f"rank_{rank:05d}.log"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, `step_00001000/` each."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The Hugging Face folder."""
        return self.path / "export"

    def create(self, logs_in: Path | None = None) -> None:
        """Make the directory and its folders.

        Args:
            logs_in: make the logs in a folder of this one, named after this run, and a link to it here; a run that has
                logs keeps them where they are.

        Raises:
            RunDirectoryError: it cannot be created or written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if logs_in is not None and not self.logs.exists():
                elsewhere = logs_in / f"{self.path.name}-{hashlib.sha256(str(self.path).encode()).hexdigest()[:8]}"
                elsewhere.mkdir(parents=True, exist_ok=True)
                self.logs.unlink(missing_ok=True)  # a link to what is no more
                self.logs.symlink_to(elsewhere)
            for folder in (self.logs, self.tensorboard, self.checkpoints):
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.path):
                pass
        except OSError as error:
            raise RunDirectoryError(
                f"run directory {self.path} cannot be written: {error.strerror or error}; "
                "name another one with --run-dir"
            ) from error


def write_atomically(path: Path, content: str) -> None:
    """Replace `path` by `content` so that a reader sees the old file or the new one, never a part."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=f".{path.name}.", delete=False, encoding="utf-8"
    ) as stream:
        temporary = Path(stream.name)
        try:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    temporary.chmod(0o644)
    temporary.replace(path)


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON object as a line, in one write, so that a reader never sees two writers' lines mixed.

    Raises:
        OSError: the line cannot be written; nothing of it stays (a disk that gets full takes a part of a write).
    """
    line = (json.dumps(record, separators=(",", ":"), default=str) + "\n").encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        written = os.write(descriptor, line)
        if written < len(line):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON-lines file; a last line without its end (a writer was killed) is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):
            records.append(json.loads(line))
    return records
