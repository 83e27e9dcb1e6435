"""The checkpoints folder of a run: what its names mean, and the one order in which they may change.

step_00001000.incomplete/   being written; no reader looks at it
step_00001000/              a checkpoint: its manifest was written last, then the folder was renamed
step_00001000.universal/    the same one, converted so that any layout can load it
step_00001000.pinned        a person wants it kept
step_00001000.damaged/      set aside because it did not verify; never deleted by us
step_00001000.deleting/     being deleted
latest                      the newest one's name, for people and DeepSpeed's tools; no reader of ours trusts it
"""

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from launcher.checkpoints.disk import sync_folder, write_durably
from launcher.checkpoints.faults import reach
from launcher.checkpoints.files import FileRecord
from launcher.checkpoints.manifest import MANIFEST_NAME, Manifest, RankManifest, faults_of, write_manifest
from launcher.errors import CheckpointError

INCOMPLETE = ".incomplete"
UNIVERSAL = ".universal"
DAMAGED = ".damaged"
DELETING = ".deleting"
REPLACED = ".replaced"
POINTER = "latest"
_STEP = re.compile(r"step_(\d{8,})")
_RANK_MANIFEST = "rank_{:05d}.json"


def folder_name(step: int) -> str:
    """Name of the folder of one step's checkpoint."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint's folder, whatever its suffix."""
    match = _STEP.match(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is no checkpoint: its name is not of the form {folder_name(0)}")
    return int(match[1])


def is_name(name: str) -> bool:
    """Whether a committed checkpoint may be called so."""
    return _STEP.fullmatch(name) is not None


def complete(checkpoints: Path) -> list[Path]:
    """Folders of committed checkpoints, oldest first; whether their files are whole is not looked at."""
    folders = [path for path in _entries(checkpoints) if _STEP.fullmatch(path.name)]
    return sorted((path for path in folders if (path / MANIFEST_NAME).is_file()), key=step_of)


def newest_of_full_size(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose files have their sizes: what a resume will use, unless a checksum says otherwise."""
    return next((folder for folder in reversed(complete(checkpoints)) if not faults_of(folder, contents=False)), None)


def universal_of(folder: Path) -> Path:
    """Where the converted form of a checkpoint is kept."""
    return folder.with_name(folder.name + UNIVERSAL)


def _entries(checkpoints: Path) -> list[Path]:
    return sorted(path for path in checkpoints.iterdir() if path.is_dir()) if checkpoints.is_dir() else []


def converted(checkpoints: Path) -> list[Path]:
    """Folders of converted forms."""
    names = (path for path in _entries(checkpoints) if path.name.endswith(UNIVERSAL))
    return [path for path in names if _STEP.fullmatch(path.name.removesuffix(UNIVERSAL))]


def write_rank_manifest(incomplete: Path, manifest: RankManifest) -> None:
    """Say that one rank's part of a checkpoint is on the disk, or why it is not."""
    sync_folder(incomplete)
    path = incomplete / _RANK_MANIFEST.format(manifest.rank)
    write_durably(path, manifest.model_dump_json(indent=1).encode(), f"rank_{manifest.rank:05d}")


def read_rank_manifest(incomplete: Path, rank: int, token: str) -> RankManifest | None:
    """What a rank said of its part in the save `token`, or None if it has not spoken yet."""
    path = incomplete / _RANK_MANIFEST.format(rank)
    try:
        manifest = RankManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    return manifest if manifest.token == token else None


def commit(incomplete: Path, manifest: Manifest, parts: Mapping[int, RankManifest]) -> Path:
    """Make a fully written folder a checkpoint: manifest last, then the rename, then the pointer.

    Args:
        incomplete: the folder, in which every rank's part is on the disk.
        manifest: of the checkpoint, without files.
        parts: what every rank wrote.

    Returns:
        The folder under its final name.

    Raises:
        CheckpointError: the folder holds a file that no rank has recorded.
    """
    files: dict[str, FileRecord] = {}
    for rank, part in sorted(parts.items()):
        files |= part.files
        (incomplete / _RANK_MANIFEST.format(rank)).unlink(missing_ok=True)
    present = {str(path.relative_to(incomplete)) for path in incomplete.rglob("*") if not path.is_dir()}
    if present != set(files):
        raise CheckpointError(
            f"checkpoint {incomplete}: recorded and present files differ: {sorted(present ^ set(files))}"
        )
    reach("commit.gathered")
    write_manifest(incomplete, manifest.model_copy(update={"files": files}))
    final = incomplete.with_name(incomplete.name.removesuffix(INCOMPLETE))
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():  # the same step again, after going back to an older checkpoint
        final.rename(replaced)
        reach("commit.replacing")
    incomplete.rename(final)
    reach("commit.renamed")
    sync_folder(final.parent)
    reach("commit.synced")
    if replaced.exists():
        delete(replaced, "replace")
    return final


def point_to(folder: Path) -> None:
    """Make `latest` name a checkpoint."""
    write_durably(folder.parent / POINTER, folder.name.encode(), "pointer")


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that no reader takes it; nothing is deleted.

    Returns:
        Where it is now.
    """
    number = 1
    while (target := folder.with_name(f"{folder.name}{DAMAGED}{f'-{number}' if number > 1 else ''}")).exists():
        number += 1
    folder.rename(target)
    sync_folder(folder.parent)
    return target


def delete(folder: Path, why: str) -> bool:
    """Delete a checkpoint's folder so that it is whole or gone to every reader, whoever is killed when.

    Args:
        folder: to delete.
        why: how the boundaries of this deletion are called.

    Returns:
        Whether this call did it; another process may be at the same.
    """
    name = folder.name if folder.name.endswith(DELETING) else folder.name + DELETING
    target = folder.with_name(name)
    reach(f"{why}.begins")
    try:
        if target != folder:
            shutil.rmtree(target, ignore_errors=True)  # of an earlier, interrupted deletion
            folder.rename(target)
    except FileNotFoundError:
        return False
    reach(f"{why}.renamed")
    for place, _, names in os.walk(target):  # unlike `rglob`, it does not mind another process at the same
        for name in sorted(names, reverse=True):
            (Path(place) / name).unlink(missing_ok=True)
            reach(f"{why}.file")
    shutil.rmtree(target, ignore_errors=True)
    reach(f"{why}.done")
    return True


def tidy(checkpoints: Path) -> list[str]:
    """Bring the folder into order after a crash; to be called by one process while nobody saves.

    Returns:
        What was done, a line each, for a person.
    """
    done = []
    for path in _entries(checkpoints):
        if path.name.endswith(REPLACED):
            original = path.with_name(path.name.removesuffix(REPLACED))
            if original.exists():
                delete(path, "tidy")
            else:
                path.rename(original)
                reach("tidy.restored")
                done.append(f"took {original.name} back, which was being replaced when a save was interrupted")
        elif path.name.endswith(INCOMPLETE):
            delete(path, "tidy")
            done.append(f"removed {path.name}, left by an interrupted save")
        elif path.name.endswith(DELETING):
            delete(path, "tidy")
    for path in converted(checkpoints):
        parent = path.with_name(path.name.removesuffix(UNIVERSAL))
        if not parent.exists() and not any(checkpoints.glob(f"{parent.name}{DAMAGED}*")):
            delete(path, "tidy")
    for path in checkpoints.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in _entries(checkpoints):
        if _STEP.fullmatch(path.name) and not (path / MANIFEST_NAME).is_file():
            target = set_aside(path)
            done.append(f"{path.name} has no {MANIFEST_NAME}, so it is no checkpoint; set aside as {target.name}")
    folders = complete(checkpoints)
    if folders and _pointed(checkpoints) != folders[-1].name:
        point_to(folders[-1])
    return done


def _pointed(checkpoints: Path) -> str | None:
    try:
        return (checkpoints / POINTER).read_text()
    except OSError:
        return None
