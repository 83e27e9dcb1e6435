"""Writing and reading a checkpoint's files: hashed as they pass by, and on the disk before anybody counts on them."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict, Field
from xxhash import xxh3_128

from launcher.checkpoints.faults import reach
from launcher.errors import CheckpointError

PIECE = 2**22
"""Bytes written or read at once: large enough that calls cost nothing, small enough to stay in the processor's cache
between reading and hashing."""
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


class HashedFile:
    """A new file that is hashed while it is written; has what `torch.save` asks of a file.

    As a context manager it puts everything on the disk at the end, after which `record` tells what was written.

    Args:
        path: of the file; one that is there is replaced.
        rank: that writes it.
    """

    def __init__(self, path: Path, rank: int = 0) -> None:
        self.path = path
        self.rank = rank
        self.error: OSError | None = None
        self._hash = xxh3_128()
        self._size = 0
        self._descriptor = -1

    def __enter__(self) -> Self:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        reach(f"file.{self.path.name}.created")
        return self

    def write(self, content: bytes | memoryview) -> int:
        """Write all of `content`; returns its length in bytes."""
        rest = memoryview(content).cast("B")
        length = rest.nbytes
        try:
            while rest.nbytes:
                written = os.write(self._descriptor, rest[:PIECE])
                self._hash.update(rest[:written])
                if self._size == 0:
                    reach(f"file.{self.path.name}.begun")
                self._size += written
                rest = rest[written:]
        except OSError as error:
            self.error = error  # torch's writer turns it into a RuntimeError that no longer says why
            raise
        return length

    def flush(self) -> None:
        """Do nothing: no byte is held back, and the end of the block waits for the disk."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                reach(f"file.{self.path.name}.written")
                os.fsync(self._descriptor)
                reach(f"file.{self.path.name}.synced")
        finally:
            os.close(self._descriptor)

    @property
    def record(self) -> FileRecord:
        """Size and hash of what was written."""
        return FileRecord(size=self._size, xxh3_128=self._hash.hexdigest(), rank=self.rank)


def write_durably(path: Path, content: bytes, point: str) -> None:
    """Replace a small file so that a reader, after a power cut too, sees the old content or the new one.

    Args:
        path: of the file.
        content: all of it.
        point: how the boundaries of this write are called.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    reach(f"{point}.begins")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        rest = memoryview(content)
        while rest.nbytes:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    reach(f"{point}.written")
    temporary.replace(path)
    reach(f"{point}.replaced")
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
