"""Host memory that a rank shares with its writer process, and that process, on their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.checkpoints.files import FileRecord, file_hash
from launcher.training.host_memory import FIRST_SIZE, HostBuffer, Writer


@pytest.fixture
def buffers() -> Iterator[list[HostBuffer]]:
    made = [HostBuffer(), HostBuffer()]
    yield made
    for buffer in made:
        buffer.close()


@pytest.fixture
def writer(buffers: list[HostBuffer]) -> Iterator[Writer]:
    process = Writer(3, buffers)
    yield process
    process.close()


def fill(buffer: HostBuffer, **files: bytes) -> None:
    buffer.empty()
    for name, content in files.items():
        file = buffer.begin_file(name)
        half = len(content) // 2
        assert file.write(content[:half]) + file.write(memoryview(content)[half:]) == len(content)
        file.end()


def test_what_was_copied_is_what_is_written(buffers: list[HostBuffer], writer: Writer, tmp_path: Path) -> None:
    """Larger than the memory is at first, and than what is written at once; then smaller, in the same memory."""
    large = {"a": os.urandom(5 * FIRST_SIZE + 7), "b": b"", "c": os.urandom(3)}
    for contents in (large, {"d": os.urandom(100)}):
        fill(buffers[0], **contents)
        records, errors = writer.write(tmp_path, buffers[0])
        assert errors == []
        for name, content in contents.items():
            assert (tmp_path / name).read_bytes() == content
            expected = FileRecord(size=len(content), xxh3_128=file_hash(tmp_path / name), rank=3)
            assert records[name] == expected


def test_two_buffers_do_not_mix(buffers: list[HostBuffer], writer: Writer, tmp_path: Path) -> None:
    for index, buffer in enumerate(buffers):
        fill(buffer, **{f"file-{index}": bytes([index]) * 1000})
    for buffer in reversed(buffers):
        assert writer.write(tmp_path, buffer)[1] == []
    assert [(tmp_path / f"file-{index}").read_bytes() for index in (0, 1)] == [b"\0" * 1000, b"\1" * 1000]


def test_an_error_of_the_disk_comes_back_as_text(buffers: list[HostBuffer], writer: Writer, tmp_path: Path) -> None:
    fill(buffers[0], a=b"1")
    records, errors = writer.write(tmp_path / "nowhere", buffers[0])
    assert (records, errors) == ({}, ["a: No such file or directory"])
    assert writer.write(tmp_path, buffers[0])[1] == []


def writers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "launcher.checkpoints.writer" in child.cmdline()]


def test_a_killed_writer_is_told_and_replaced(buffers: list[HostBuffer], writer: Writer, tmp_path: Path) -> None:
    fill(buffers[0], a=b"1")
    assert writer.write(tmp_path, buffers[0])[1] == []
    (process,) = writers()
    process.kill()
    _, errors = writer.write(tmp_path, buffers[0])
    assert errors == ["the process that writes checkpoints ended with code -9; another one is started"]
    assert writer.write(tmp_path, buffers[0])[1] == []


def test_a_signal_to_end_is_for_the_rank(buffers: list[HostBuffer], writer: Writer, tmp_path: Path) -> None:
    fill(buffers[0], a=b"1")
    assert writer.write(tmp_path, buffers[0])[1] == []
    (process,) = writers()
    for number in (signal.SIGINT, signal.SIGTERM):
        process.send_signal(number)
    assert writer.write(tmp_path, buffers[0])[1] == []


def test_a_writer_ends_with_its_rank(tmp_path: Path) -> None:
    program = (
        "import time; from pathlib import Path; from launcher.training.host_memory import HostBuffer, Writer\n"
        f"buffer = HostBuffer(); writer = Writer(0, [buffer]); print(writer.write(Path({str(tmp_path)!r}), buffer))\n"
        "print(writer._process.pid, flush=True); time.sleep(60)"
    )
    rank = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    rank.stdout.readline()
    process = psutil.Process(int(rank.stdout.readline()))
    assert "launcher.checkpoints.writer" in process.cmdline()
    rank.kill()
    rank.wait()
    deadline = time.monotonic() + 20
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.02)
