"""What a manifest says of a checkpoint's files, and comparing them with it."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field
from xxhash import xxh3_128

from launcher.checkpoints.disk import PIECE, HashedFile
from launcher.errors import CheckpointError

THREADS = 4
"""Files hashed at once by one process, at most; hashing and reading both run outside Python's lock."""


class FileRecord(BaseModel):
    """What a manifest says of one file.

    Attributes:
        size: in bytes.
        xxh3_128: of the content, as 32 hexadecimal digits.
        rank: that wrote it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(ge=0)
    xxh3_128: str = Field(pattern=r"^[0-9a-f]{32}$")
    rank: int = Field(default=0, ge=0)


def record_of(file: HashedFile, rank: int = 0) -> FileRecord:
    """What to say of a file that a rank has written."""
    return FileRecord(size=file.size, xxh3_128=file.xxh3_128, rank=rank)


def file_hash(path: Path) -> str:
    """xxh3-128 of a file, read in pieces."""
    hashed, buffer = xxh3_128(), memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            hashed.update(buffer[:count])
    return hashed.hexdigest()


def path_inside(folder: Path, name: str) -> Path:
    """Resolve a name from a manifest, pointer or request, which must stay inside the folder.

    Raises:
        CheckpointError: it is absolute, climbs out, or leads out through a link.
    """
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or name in ("", "."):
        raise CheckpointError(f"{folder}: the file name {name!r} leads out of the folder; the checkpoint is refused")
    path = folder / pure
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(f"{folder}: {name} is a link that leads out of the folder; the checkpoint is refused")
    return path


def damages(
    folder: Path, files: Mapping[str, FileRecord], *, contents: bool, names: Iterable[str] | None = None
) -> list[str]:
    """Compare files with their records.

    Args:
        folder: that the names are relative to.
        files: record by name.
        contents: compare hashes too, in threads; sizes are compared in any case, and first.
        names: only these, so that several processes can share the work; default: all.

    Returns:
        What is wrong, a line a file, such as `optim.pt: 10 bytes instead of 12`; empty when nothing is.
    """
    chosen = sorted(files if names is None else names, key=lambda name: -files[name].size)
    wrong = {name: text for name in chosen if (text := _wrong_size(folder, name, files[name].size))}
    whole = [name for name in chosen if name not in wrong]
    if contents and whole:
        with ThreadPoolExecutor(min(THREADS, len(whole))) as pool:
            checks = pool.map(lambda name: _wrong_content(folder, name, files[name].xxh3_128), whole)
            wrong |= {name: text for name, text in zip(whole, checks, strict=True) if text}
    return [f"{name}: {wrong[name]}" for name in sorted(wrong)]


def _wrong_size(folder: Path, name: str, size: int) -> str:
    try:
        path = path_inside(folder, name)
        present = path.stat().st_size
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if not path.is_file():
        return "is not a file"
    return "" if present == size else f"{present:,} bytes instead of {size:,}"


def _wrong_content(folder: Path, name: str, expected: str) -> str:
    try:
        found = file_hash(folder / name)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return "" if found == expected else f"its content has the checksum {found} instead of {expected}"
