"""A checkpoint's folder while all ranks write into it, up to its commit by rank 0. Every call is collective."""

import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist

from launcher.checkpoints import folders
from launcher.checkpoints.faults import reach
from launcher.checkpoints.files import FileRecord
from launcher.checkpoints.manifest import Manifest, RankManifest
from launcher.errors import CheckpointError
from launcher.training.distributed import all_gather, broadcast


class CollectiveFolder:
    """One folder that becomes a checkpoint, or nothing.

    What goes wrong comes back as text, the same on every rank, so that all of them can decide alike.

    Args:
        incomplete: its name until it is committed.
        token: of this save, the same on every rank and another one for every save.
    """

    def __init__(self, incomplete: Path, token: str) -> None:
        self.incomplete = incomplete
        self.token = token
        self.rank = dist.get_rank()

    def make(self) -> list[str]:
        """Rank 0 makes the folder, in the place of what an earlier attempt left."""
        return broadcast(lambda: attempted(lambda: _make_empty(self.incomplete)))

    def record(self, files: Mapping[str, FileRecord], errors: list[str]) -> list[str]:
        """Put on record what this rank has written, or why it could not; returns what went wrong on any rank."""
        part = RankManifest(rank=self.rank, token=self.token, files=dict(files))
        errors = errors or attempted(lambda: folders.write_rank_manifest(self.incomplete, part))
        return [
            f"rank {rank} on {host}: {text}"
            for rank, (host, texts) in enumerate(all_gather((socket.gethostname(), errors)))
            for text in texts
        ]

    def commit(self, manifest: Manifest) -> list[str]:
        """Rank 0 makes the folder a checkpoint; the others wait for it."""
        return broadcast(lambda: attempted(lambda: self._commit(manifest)))

    def _commit(self, manifest: Manifest) -> None:
        commit_parts(self.incomplete, self.token, manifest, dist.get_world_size())

    def abandon(self) -> None:
        """Give back the disk that a failed save has taken."""
        if self.rank == 0:
            folders.delete(self.incomplete, "abandon")


def commit_parts(incomplete: Path, token: str, manifest: Manifest, world_size: int) -> Path:
    """Make a folder a checkpoint once every rank has written its part into it.

    Args:
        incomplete: the folder.
        token: of the save.
        manifest: of the checkpoint, without files.
        world_size: how many parts there must be.

    Raises:
        CheckpointError: a part is not to be seen from here.
    """
    parts = {}
    for rank in range(world_size):
        part = folders.read_rank_manifest(incomplete, rank, token)
        if part is None:
            raise CheckpointError(f"rank {rank} wrote its part where rank 0 does not see it: {incomplete}")
        parts[rank] = part
    return folders.commit(incomplete, manifest, parts)


def _make_empty(folder: Path) -> None:
    reach("folder.begins")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    reach("folder.made")


def attempted(action: Callable[[], object]) -> list[str]:
    """Do it; what the disk or the checkpoint has against it becomes text that can be told to the other ranks."""
    try:
        action()
    except OSError as error:
        return [f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")]
    except CheckpointError as error:
        return [str(error)]
    return []
