"""Converting a checkpoint without a run, in processes of this machine; a resume does the same in its ranks."""

import multiprocessing
import os
import secrets
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoints import folders
from launcher.checkpoints.files import FileRecord
from launcher.checkpoints.manifest import Manifest, RankManifest, faults_of, manifest_hash, read_manifest
from launcher.checkpoints.resumable import unconvertible_reason
from launcher.errors import CheckpointError, StorageError


@dataclass(frozen=True)
class Converted:
    """A checkpoint's universal form.

    Attributes:
        folder: of it.
        size: bytes.
        seconds: that making it took; 0 when it was there already.
    """

    folder: Path
    size: int
    seconds: float


def convert_locally(folder: Path, workers: int | None = None) -> Converted:
    """Convert a checkpoint in processes of this machine, under the same protocol as a save.

    Args:
        folder: of the checkpoint; nobody else may be at work in its run directory.
        workers: processes; `None` for one a core.

    Raises:
        CheckpointError: the checkpoint is damaged, or of a layout that cannot be converted.
        StorageError: the universal form cannot be written.
    """
    target = folders.universal_of(folder)
    source = manifest_hash(folder)
    if target.is_dir() and not faults_of(target, contents=True) and read_manifest(target).source == source:
        return Converted(target, read_manifest(target).size, 0.0)
    if wrong := faults_of(folder, contents=True):
        raise CheckpointError(f"checkpoint {folder} is damaged: {'; '.join(wrong)}")
    manifest = read_manifest(folder)
    if reason := unconvertible_reason(manifest):
        raise CheckpointError(f"checkpoint {folder} cannot be converted: {reason}")
    began = time.monotonic()
    incomplete = target.with_name(target.name + folders.INCOMPLETE)
    shutil.rmtree(incomplete, ignore_errors=True)
    try:
        incomplete.mkdir()
        parts = _write_parts(folder, manifest, incomplete, workers or len(os.sched_getaffinity(0)))
        facts = {"kind": "universal", "source": source, "reason": "convert", "saved_at": time.time()}
        folders.commit(incomplete, manifest.model_copy(update=facts), parts)
    except (OSError, BrokenProcessPool) as error:
        raise StorageError(f"{folder} cannot be converted: {error}") from error
    finally:
        shutil.rmtree(incomplete, ignore_errors=True)
    return Converted(target, read_manifest(target).size, time.monotonic() - began)


def _write_parts(folder: Path, manifest: Manifest, incomplete: Path, workers: int) -> dict[int, RankManifest]:
    token = secrets.token_hex(8)
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's threads
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        shares = [pool.submit(_write_share, folder, manifest, incomplete, rank, workers) for rank in range(workers)]
        files = [share.result() for share in shares]
    parts = {rank: RankManifest(rank=rank, token=token, files=records) for rank, records in enumerate(files)}
    for part in parts.values():
        folders.write_rank_manifest(incomplete, part)
    return parts


def _write_share(folder: Path, manifest: Manifest, target: Path, rank: int, count: int) -> dict[str, FileRecord]:
    from launcher.training.universal import convert

    return convert(folder, manifest, target, rank, count)
