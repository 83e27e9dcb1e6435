"""The process beside a rank that writes its checkpoints from shared memory, so that training need not wait for a disk.

It has a lock of its own in Python, knows no torch, and takes one job a line from its standard input:
`{"folder": "...", "buffer": 5, "files": [["optim.pt", OFFSET, SIZE], ...], "gently": true}`, where the buffer is the
descriptor of the shared memory. It answers with one line: `{"files": {"optim.pt": [SIZE, HASH]}, "error": null,
"seconds": 1.5}`.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from launcher.checkpoints.disk import PIECE, HashedFile
from launcher.checkpoints.faults import killed_with

NICENESS = 15
"""Training goes first where the two share a core: a process of this niceness gets 3 % of one that it has to share. It
cannot be starved: a save that comes meanwhile waits for it, and its rank then needs no processor."""
REST = 2.0
"""How long the writer rests after each piece, in times of what the piece took, while nobody waits for it: training on
the same cores and the same memory is disturbed a third as much, for three times as long."""
PR_SET_PDEATHSIG = 1


def write(job: dict[str, Any]) -> dict[str, Any]:
    """Write the files of one job, hashed and on the disk when this returns; an error of the disk becomes text."""
    began = time.monotonic()
    files: dict[str, tuple[int, str]] = {}
    error = None
    for name, offset, size in job["files"]:
        try:
            files[name] = _write_file(Path(job["folder"]) / name, job["buffer"], offset, size, job["gently"])
        except OSError as problem:
            error = f"{name}: {problem.strerror or problem}"
            break
    return {"files": files, "error": error, "seconds": time.monotonic() - began}


def _write_file(path: Path, descriptor: int, offset: int, size: int, gently: bool) -> tuple[int, str]:
    piece = memoryview(bytearray(min(PIECE, size)))
    file = HashedFile(path)
    with file:
        while file.size < size:
            began = time.monotonic()
            read = os.preadv(descriptor, [piece[: size - file.size]], offset + file.size)
            if read == 0:
                raise OSError(f"the shared memory ends after {file.size} of {size} bytes")
            file.write(piece[:read])
            if gently:
                file.sync()  # as it goes, or the end would send everything to the disk at once
                time.sleep(REST * (time.monotonic() - began))
    return file.size, file.xxh3_128


def main() -> None:
    """Serve one rank until it closes the pipe or dies."""
    rank = os.getppid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != rank:  # it died before it could be watched
        return
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the rank, which still wants its last save written
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    killed_with(rank)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(write(json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
