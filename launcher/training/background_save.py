"""Writing and committing checkpoints beside the training: a thread that waits, a process that works."""

import queue
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from launcher.checkpoints import folders
from launcher.checkpoints.files import FileRecord
from launcher.checkpoints.manifest import Manifest, RankManifest
from launcher.training.collective_folder import attempted, commit_parts
from launcher.training.host_memory import HostBuffer, Writer

LOOK_INTERVAL_S = 0.05


@dataclass(frozen=True)
class Outcome:
    """How a save ended, as rank 0 knows it; the other ranks know no errors but their own.

    Attributes:
        step: that was saved.
        reason: why.
        errors: what went wrong; empty when the checkpoint is committed.
        seconds: from the call to the commit.
        blocked_seconds: that training waited.
    """

    step: int
    reason: str
    errors: tuple[str, ...]
    seconds: float
    blocked_seconds: float


@dataclass
class Save:
    """One save, from the copy of the states to the commit.

    Attributes:
        incomplete: its folder until then.
        token: of the save, the same on every rank.
        manifest: of the checkpoint, without files.
        buffer: holds this rank's files.
        gently: nobody waits for it.
        began: monotonic seconds, when the save was asked for.
        errors: what went wrong on this rank before the writing began.
        copied: monotonic seconds, when training went on.
    """

    incomplete: Path
    token: str
    manifest: Manifest
    buffer: HostBuffer
    began: float
    gently: bool = False
    errors: list[str] = field(default_factory=list)
    copied: float = 0.0


class BackgroundSaver:
    """Takes copied states and makes checkpoints of them, one at a time and in order; every rank has one.

    The ranks tell rank 0 what they wrote through the process group's store, which needs no turn in the order of
    collectives, and rank 0 commits.

    Args:
        after_commit: called on rank 0 when a checkpoint is committed.
    """

    def __init__(self, after_commit: Callable[[Path], None]) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._after_commit = after_commit
        self._store = c10d.PrefixStore("zerofleet-checkpoints", c10d._get_default_store())
        self._buffer = HostBuffer()
        self._writer = Writer(self.rank, [self._buffer])
        self._saves: queue.Queue[Save | None] = queue.Queue()
        self._outcomes: queue.Queue[Outcome] = queue.Queue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    @property
    def is_busy(self) -> bool:
        """Whether a save is being written or waits for its turn; on rank 0, until it is committed."""
        return self._saves.unfinished_tasks > 0

    def free_buffer(self) -> HostBuffer:
        """The buffer, once the save before is over.

        On rank 0 that is its commit: a second save in memory would be a second interval that a crash can take.
        """
        self.drain()
        self._buffer.empty()
        return self._buffer

    def begin(self, save: Save) -> None:
        """Hand over a save whose states are copied."""
        save.copied = time.monotonic()
        self._saves.put(save)

    def outcomes(self) -> list[Outcome]:
        """How saves ended since the last call."""
        ended = []
        while True:
            try:
                ended.append(self._outcomes.get_nowait())
            except queue.Empty:
                return ended

    def drain(self) -> None:
        """Wait until everything that was handed over is written and, on rank 0, committed."""
        self._saves.join()

    def close(self) -> None:
        """End thread and process; what is not drained is given up, and the next start tidies up after it."""
        self._ending.set()
        self._saves.put(None)
        if self.is_busy:
            self._writer.kill()
        self._thread.join()
        self._writer.close()
        self._buffer.close()

    def _work(self) -> None:
        while (save := self._saves.get()) is not None:
            try:
                self._outcomes.put(self._make(save))
            except Exception as error:  # whoever drains must not wait for a thread that has ended
                self._outcomes.put(_outcome(save, [f"{type(error).__name__}: {error}"]))
            finally:
                self._saves.task_done()
        self._saves.task_done()

    def _make(self, save: Save) -> Outcome:
        records: dict[str, FileRecord] = {}
        errors = save.errors
        if not errors:
            records, errors = self._writer.write(save.incomplete, save.buffer, gently=save.gently)
        part = RankManifest(rank=self.rank, token=save.token, files=records)
        errors = errors or attempted(lambda: folders.write_rank_manifest(save.incomplete, part))
        host = socket.gethostname()
        part = part.model_copy(
            update={"error": "; ".join(f"rank {self.rank} on {host}: {text}" for text in errors) or None}
        )
        self._store.set(f"{save.token}/{self.rank}", part.model_dump_json())
        if self.rank == 0:
            errors = self._commit(save)
        return _outcome(save, errors)

    def _commit(self, save: Save) -> list[str]:
        """Wait for all ranks' parts and make the folder a checkpoint, or nothing."""
        parts = {}
        for rank in range(self.world_size):
            part = self._part(f"{save.token}/{rank}")
            if part is None:
                return ["the run ended before it was written"]
            parts[rank] = part
        errors = [part.error for part in parts.values() if part.error is not None]
        errors = errors or attempted(
            lambda: self._after_commit(commit_parts(save.incomplete, save.token, save.manifest, self.world_size))
        )
        if errors:
            attempted(lambda: folders.delete(save.incomplete, "abandon"))
        return errors

    def _part(self, key: str) -> RankManifest | None:
        while not self._store.check([key]):
            if self._ending.wait(LOOK_INTERVAL_S):
                return None
        part = RankManifest.model_validate_json(self._store.get(key))
        self._store.delete_key(key)
        return part


def _outcome(save: Save, errors: list[str]) -> Outcome:
    manifest, ended = save.manifest, time.monotonic()
    return Outcome(
        manifest.step, manifest.reason, tuple(errors), ended - save.began, blocked_seconds=save.copied - save.began
    )
