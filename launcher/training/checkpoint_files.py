"""Where DeepSpeed hands over what it saves and asks for what it loads: every byte passes through here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, BinaryIO, cast

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine

from launcher.checkpoints.disk import HashedFile
from launcher.checkpoints.files import FileRecord, record_of
from launcher.errors import CheckpointError
from launcher.training.host_memory import HostBuffer, HostFile
from launcher.training.upstream import loading_only_data


class CheckpointFiles(CheckpointEngine):  # type: ignore[misc]  # deepspeed has no types
    """DeepSpeed's checkpoint engine, whose `save` it calls once a file and whose `load` once a file it needs.

    Files go to the disk at once or, when a save begins with a buffer, into host memory. An error of either is kept in
    `errors` instead of raised: DeepSpeed ends a save with a barrier, at which the other ranks would wait for ever.

    Args:
        rank: of this process.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.folder = Path()
        self.records: dict[str, FileRecord] = {}
        self.errors: list[str] = []
        self.buffer: HostBuffer | None = None
        self._elsewhere: tuple[Path, Callable[[str], BinaryIO]] | None = None

    def begin(self, folder: Path, buffer: HostBuffer | None = None) -> None:
        """Start a save into a folder that exists, or into host memory."""
        self.folder, self.records, self.errors, self.buffer = folder, {}, [], buffer

    def create(self, info: CheckpointCommitInfo) -> None:
        """Do nothing: `begin` came before."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Do nothing: rank 0 has made the folder, and DeepSpeed asks for no other."""

    def save(self, state_dict: Any, path: str) -> None:
        """Write one file, hashed and on the disk when this returns, or copy it into host memory."""
        target = Path(path)
        name = str(target.relative_to(self.folder))
        try:
            if self.buffer is None:
                self.records[name] = write_state(state_dict, target, self.rank)
            else:
                file = self.buffer.begin_file(name)
                serialise(state_dict, file)
                file.end()
        except OSError as error:
            self.errors.append(f"{target.name}: {error.strerror or error}")

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file that `save` wrote."""
        if self._elsewhere is not None and Path(path).is_relative_to(self._elsewhere[0]):
            folder, read = self._elsewhere
            with read(str(Path(path).relative_to(folder))) as content:
                return read_state(Path(path), map_location=map_location, content=content)
        return read_state(Path(path), map_location=map_location)

    @contextmanager
    def reading_from(self, folder: Path, read: Callable[[str], BinaryIO]) -> Iterator[None]:
        """Let the files of a folder come from elsewhere: `read` is given their names."""
        self._elsewhere = folder, read
        try:
            yield
        finally:
            self._elsewhere = None

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Do nothing: the checkpoint manager commits once every rank is done."""
        return True


def write_state(state: Any, path: Path, rank: int) -> FileRecord:
    """Write a state with `torch.save`, hashed while it is written, and wait for the disk.

    Raises:
        OSError: the disk is full or fails.
    """
    file = HashedFile(path)
    with file:
        try:
            serialise(state, file)
        except RuntimeError as error:
            raise file.error or error from error
    return record_of(file, rank)


def serialise(state: Any, file: HashedFile | HostFile) -> None:
    """`torch.save` into a file of ours."""
    with _without_crc32():
        torch.save(state, cast(IO[bytes], file))


@contextmanager
def _without_crc32() -> Iterator[None]:
    """Leave out torch's own checksum, which holds Python's lock, costs half of the time and is never looked at."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def read_state(path: Path, map_location: Any = "cpu", *, mapped: bool = False, content: BinaryIO | None = None) -> Any:
    """Read what `write_state` wrote; a file that would run code when loaded is refused.

    Args:
        path: of the file.
        map_location: as in `torch.load`.
        mapped: map the file into memory, so that only what is used is read; nobody may keep the tensors.
        content: of the file, when it does not lie on the disk.

    Raises:
        CheckpointError: the file is no state of ours, or holds code.
    """
    try:
        with loading_only_data():
            return torch.load(content or path, map_location=map_location, weights_only=True, mmap=mapped)
    except UnpicklingError as error:
        raise CheckpointError(f"{path} is refused: it is no checkpoint of ours, or would run code: {error}") from error
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
