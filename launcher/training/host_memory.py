"""Host memory that a rank copies its states into and its writer process writes them from."""

import json
import mmap
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

from launcher.checkpoints.files import FileRecord

COPIED_AT_ONCE = 2**25
"""Bytes copied before other Python threads, such as the one that answers polls, may run again."""
FIRST_SIZE = 2**20


class HostBuffer:
    """Memory without a name, so that nothing is left when the processes that share it end, however they end.

    It grows as it is first filled and keeps its pages, so that the first save pays for them and the later ones do not.
    """

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("zerofleet-checkpoint")
        self.files: list[tuple[str, int, int]] = []
        self._used = 0
        os.ftruncate(self.descriptor, FIRST_SIZE)
        self._memory = mmap.mmap(self.descriptor, FIRST_SIZE)

    def empty(self) -> None:
        """Forget the files of the last save."""
        self.files = []
        self._used = 0

    def begin_file(self, name: str) -> "HostFile":
        """A new file behind those that are there."""
        return HostFile(self, name)

    def append(self, content: bytes | memoryview) -> int:
        """Copy bytes behind those that are there; returns how many."""
        source = memoryview(content).cast("B")
        end = self._used + source.nbytes
        if end > len(self._memory):
            self._memory.resize(max(end, 2 * len(self._memory)))
        for start in range(0, source.nbytes, COPIED_AT_ONCE):
            piece = source[start : start + COPIED_AT_ONCE]
            self._memory[self._used + start : self._used + start + piece.nbytes] = piece
        self._used = end
        return source.nbytes

    @property
    def used(self) -> int:
        """Bytes in it."""
        return self._used

    @property
    def capacity(self) -> int:
        """Bytes that it takes without growing."""
        return len(self._memory)

    def close(self) -> None:
        """Give the memory back once the writer has closed its side too."""
        self._memory.close()
        os.close(self.descriptor)


class HostFile:
    """What `torch.save` asks of a file, on top of a buffer."""

    def __init__(self, buffer: HostBuffer, name: str) -> None:
        self.buffer, self.name = buffer, name
        self._offset = buffer.used

    def write(self, content: bytes | memoryview) -> int:
        """Copy `content`; returns its length in bytes."""
        return self.buffer.append(content)

    def flush(self) -> None:
        """Do nothing."""

    def end(self) -> None:
        """All of the file is there."""
        self.buffer.files.append((self.name, self._offset, self.buffer.used - self._offset))


class Writer:
    """The writer process of one rank, started again when it has died.

    Args:
        rank: that it writes for.
        buffers: all that it may be told to read.
    """

    def __init__(self, rank: int, buffers: Sequence[HostBuffer]) -> None:
        self._rank = rank
        self._descriptors = [buffer.descriptor for buffer in buffers]
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.checkpoints.writer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=self._descriptors,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # Ctrl-C is for the training
        )

    def write(
        self, folder: Path, buffer: HostBuffer, *, gently: bool = False
    ) -> tuple[dict[str, FileRecord], list[str]]:
        """Write a buffer's files into a folder; returns when they are on the disk, or with what went wrong.

        Args:
            folder: to write into.
            buffer: that holds the files.
            gently: take longer, and disturb what runs on the same cores less.
        """
        job = {"folder": str(folder), "buffer": buffer.descriptor, "files": buffer.files, "gently": gently}
        answer = self._ask(job)
        if answer is None:
            code = self._process.wait()
            self._process = self._start()
            return {}, [f"the process that writes checkpoints ended with code {code}; another one is started"]
        records = {
            name: FileRecord(size=size, xxh3_128=digest, rank=self._rank)
            for name, (size, digest) in answer["files"].items()
        }
        return records, [] if answer["error"] is None else [answer["error"]]

    def _ask(self, job: dict[str, Any]) -> dict[str, Any] | None:
        question, answer = cast(IO[str], self._process.stdin), cast(IO[str], self._process.stdout)
        try:
            question.write(json.dumps(job) + "\n")
            question.flush()
        except BrokenPipeError:
            return None
        line = answer.readline()
        return json.loads(line) if line else None

    def kill(self) -> None:
        """End the process in the middle of its work."""
        self._process.kill()

    def close(self) -> None:
        """End the process once it has answered."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
