"""Writing a checkpoint's files: hashed as they pass by, and on the disk before anybody counts on them.

The process that writes beside the training imports this and little else, so that it starts in a moment.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from xxhash import xxh3_128

from launcher.checkpoints.faults import reach

PIECE = 2**22
"""Bytes written or read at once: large enough that calls cost nothing, small enough to stay in the processor's cache
between reading and hashing."""


class HashedFile:
    """A new file that is hashed while it is written; has what `torch.save` asks of a file.

    As a context manager it puts everything on the disk at the end.

    Args:
        path: of the file; one that is there is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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

    def sync(self) -> None:
        """Wait until what was written is on the disk; the end of the block does so in any case."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            self.error = error
            raise

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
    def size(self) -> int:
        """Bytes written."""
        return self._size

    @property
    def xxh3_128(self) -> str:
        """Of what was written, as 32 hexadecimal digits."""
        return self._hash.hexdigest()


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
