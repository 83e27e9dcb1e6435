"""Finding the newest checkpoint that can be trusted, and making the form of it that this layout can load."""

import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.distributed as dist

from launcher.checkpoints import folders
from launcher.checkpoints.files import FileRecord
from launcher.checkpoints.manifest import Manifest, faults_of, manifest_hash, read_manifest
from launcher.errors import CheckpointError, StorageError
from launcher.planning.plan import Plan
from launcher.training.collective_folder import CollectiveFolder, attempted
from launcher.training.distributed import all_gather, broadcast
from launcher.training.universal import convert

PROGRESS_INTERVAL_S = 10.0


class Restorer:
    """Every rank has one, and its methods are collective.

    Args:
        directory: the run's folder of checkpoints.
        plan: of the run.
        tell: told what a person should know, on rank 0.
        attempt: names this attempt, the same on every rank.
    """

    def __init__(self, directory: Path, plan: Plan, tell: Callable[[str], None], attempt: str) -> None:
        self.directory = directory
        self.plan = plan
        self._tell = tell
        self._attempt = attempt
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def converted(self, folder: Path, manifest: Manifest) -> Path:
        """The checkpoint's universal form, from the cache beside it or made now by all ranks together.

        Raises:
            StorageError: it cannot be written.
        """
        cached = folders.universal_of(folder)
        source = manifest_hash(folder)
        if broadcast(lambda: _is_converted(cached, source)):
            if not self._faults(cached):
                return cached
            broadcast(lambda: folders.delete(cached, "cache"))
        began = time.monotonic()
        self._tell(f"converting {folder.name} ({_size(manifest.size)}) for this layout")
        incomplete = cached.with_name(cached.name + folders.INCOMPLETE)
        target = CollectiveFolder(incomplete, f"{self._attempt}.convert")
        errors = target.make()
        if not errors:
            records: dict[str, FileRecord] = {}
            wrong = attempted(lambda: records.update(self._write_share(folder, manifest, incomplete)))
            errors = target.record(records, wrong)
        facts = {"kind": "universal", "source": source, "reason": "convert", "saved_at": time.time()}
        errors = errors or target.commit(manifest.model_copy(update=facts))
        if errors:
            target.abandon()
            raise StorageError(
                f"{folder} cannot be converted for this layout ({_free_space(self.directory)} free there): "
                + "; ".join(errors)
            )
        size = _size(read_manifest(cached).size)
        self._tell(f"converted in {time.monotonic() - began:.1f} s; {cached.name} has {size}")
        return cached

    def _write_share(self, folder: Path, manifest: Manifest, target: Path) -> dict[str, FileRecord]:
        """This rank's share of the universal form; the ranks of a machine share its cores."""
        threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        progress = Progress(manifest.size / self.world_size, self._tell)
        return convert(folder, manifest, target, self.rank, self.world_size, threads, progress.add)

    def newest_verified(self) -> Path | None:
        """The newest checkpoint whose files all ranks together found whole; the bad ones before it are set aside."""
        set_aside = []
        for note in broadcast(lambda: folders.tidy(self.directory)):
            self._tell(note)
        while True:
            name = broadcast(lambda: _newest_name(self.directory))
            if name is None:
                break
            folder = self.directory / name
            wrong = self._faults(folder)
            if not wrong:
                return folder
            moved = str(broadcast(partial(folders.set_aside, folder)))
            set_aside.append(moved)
            self._tell(f"checkpoint {name} is damaged: {'; '.join(wrong)}. It is set aside as {moved}")
        if set_aside:
            raise CheckpointError(
                f"no checkpoint of {self.directory} can be trusted; set aside: {', '.join(set_aside)}. "
                "Run again to start from the beginning, or put a sound checkpoint there."
            )
        return None

    def _faults(self, folder: Path) -> list[str]:
        """What is wrong with a folder, each rank looking at a part of it."""
        contents = self.plan.recipe.checkpoint.verify == "full"
        parts = all_gather(faults_of(folder, contents=contents, share=(self.rank, self.world_size)))
        return sorted({fault for part in parts for fault in part})


class Progress:
    """Says from time to time how far a conversion is; rank 0's share stands for all of them.

    Args:
        size: bytes to convert, about.
        tell: told a line.
        clock: seconds, monotonic.
    """

    def __init__(self, size: float, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._tell, self._clock = max(size, 1.0), tell, clock
        self._done = 0
        self._began = self._last = clock()

    def add(self, size: int) -> None:
        """So many bytes more are written."""
        self._done += size
        now = self._clock()
        if now - self._last >= PROGRESS_INTERVAL_S:
            self._last = now
            self._tell(f"converting: {min(self._done / self._size, 1.0):.0%} after {now - self._began:.0f} s")


def _newest_name(checkpoints: Path) -> str | None:
    present = folders.complete(checkpoints)
    return present[-1].name if present else None


def _is_converted(cached: Path, source: str) -> bool:
    """Whether the cache was made from this very checkpoint; whether its files are whole is another question."""
    try:
        return read_manifest(cached).source == source
    except CheckpointError:
        return False


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
