"""One driver at a time on a run directory, told apart from dead ones with real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from launcher.errors import RunDirectoryError
from launcher.orchestration.run_lock import Holder, holding
from launcher.run_directory import RunDirectory

HOLD = """
import sys, time
from launcher.orchestration.run_lock import holding
from launcher.run_directory import RunDirectory
with holding(RunDirectory.at(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory.at(tmp_path / "a run")


@pytest.fixture
def other(directory: RunDirectory) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the directory."""
    command = [sys.executable, "-c", HOLD, str(directory.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write_holder(directory: RunDirectory, **facts: object) -> None:
    directory.create()
    directory.lock.write_text(json.dumps(asdict(replace(Holder.here(), **facts))))  # type: ignore[arg-type]  # facts of several types


def test_a_second_run_is_refused_and_told_who_holds_it(directory: RunDirectory, other: subprocess.Popen[str]) -> None:
    with pytest.raises(RunDirectoryError) as error, holding(directory):
        pytest.fail("two hold it")
    assert f"is in use by process {other.pid} on {os.uname().nodename}, since {time.strftime('%Y-')}" in str(
        error.value
    )
    assert "--run-dir" in str(error.value)


def test_a_killed_holder_is_succeeded(directory: RunDirectory, other: subprocess.Popen[str]) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert json.loads(directory.lock.read_text())["pid"] == other.pid, "it could not clean up"
    with holding(directory):
        assert json.loads(directory.lock.read_text())["pid"] == os.getpid()
    assert directory.lock.read_text() == ""


def test_it_is_free_after_the_block_and_after_an_error(directory: RunDirectory) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), holding(directory):
            raise ZeroDivisionError
    with holding(directory):
        pass


def test_a_later_process_with_the_same_pid_is_another_one(directory: RunDirectory) -> None:
    write_holder(directory, started=1.0)
    with holding(directory):
        pass


def test_a_running_holder_is_recognised_where_the_file_system_has_no_locks(directory: RunDirectory) -> None:
    write_holder(directory, command="zerofleet run quickstart")
    here = f"process {os.getpid()} on .*: zerofleet run quickstart"
    with pytest.raises(RunDirectoryError, match=here), holding(directory):
        pytest.fail("two hold it")


def test_a_holder_on_another_machine_is_explained_and_can_be_removed(directory: RunDirectory) -> None:
    write_holder(directory, host="node17", pid=4711)
    with pytest.raises(RunDirectoryError) as error, holding(directory):
        pytest.fail("two hold it")
    text = str(error.value)
    assert "process 4711 on node17" in text
    assert "cannot see whether the process still runs" in text
    command = text.rpartition("take the run directory with: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    with holding(directory):
        pass


def test_a_requeued_job_succeeds_itself_on_another_machine(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_holder(directory, host="node17", pid=4711, job="815")
    monkeypatch.setenv("SLURM_JOB_ID", "816")
    with pytest.raises(RunDirectoryError, match="Slurm job 815"), holding(directory):
        pytest.fail("two hold it")
    monkeypatch.setenv("SLURM_JOB_ID", "815")
    with holding(directory):
        assert json.loads(directory.lock.read_text())["job"] == "815"


def test_a_torn_lock_file_holds_nobody_up(directory: RunDirectory) -> None:
    directory.create()
    directory.lock.write_text('{"host": "no')
    with holding(directory):
        pass


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RunDirectoryError, match="cannot be written"),
        holding(RunDirectory.at(tmp_path / "file" / "run")),
    ):
        pytest.fail("held")
