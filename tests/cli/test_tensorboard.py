"""`zerofleet tensorboard` starts the real TensorBoard, on loopback only."""

import json
import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from launcher.cli.tensorboard import tensorboard_sources
from launcher.errors import RunDirectoryError
from launcher.run_directory import RunDirectory


def make_run(path: Path, value: float) -> None:
    directory = RunDirectory.at(path)
    directory.create()
    writer = EventFileWriter(str(directory.tensorboard))
    summary = Summary(value=[Summary.Value(tag="train/loss", simple_value=value)])
    writer.add_event(Event(wall_time=time.time(), step=1, summary=summary))
    writer.close()


def test_two_runs_are_served_under_their_names_on_loopback(tmp_path: Path):
    make_run(tmp_path / "runs" / "one", 1.0)
    make_run(tmp_path / "elsewhere" / "two", 2.0)
    command = [sys.executable, "-m", "launcher.cli.main", "tensorboard", "one", "elsewhere/two", "--port", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            address = next(found.group() for line in process.stderr if (found := re.search(r"http://[^/]+:\d+/", line)))
            deadline = time.monotonic() + 30
            names: list[str] = []
            while len(names) < 2 and time.monotonic() < deadline:
                with urllib.request.urlopen(f"{address}data/runs", timeout=10) as answer:
                    names = json.load(answer)
                time.sleep(0.1)
            listening = [
                connection.laddr.ip
                for owner in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                for connection in owner.net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            ]
        finally:
            process.terminate()
    assert sorted(names) == ["elsewhere/two/.", "one/."]
    assert set(listening) == {"127.0.0.1"}


def test_one_run_is_a_logdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    RunDirectory.at("runs/one").create()
    assert tensorboard_sources(["one"]) == ["--logdir", f"{tmp_path}/runs/one/tensorboard"]
    assert tensorboard_sources(["runs/one"]) == ["--logdir", f"{tmp_path}/runs/one/tensorboard"]


def test_what_is_no_run_and_what_tensorboard_cannot_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    RunDirectory.at("runs/a,b").create()
    RunDirectory.at("runs/c:d").create()
    assert tensorboard_sources(["a,b"])[0] == "--logdir"
    with pytest.raises(RunDirectoryError, match="TensorBoard separates runs by commas; rename the folder"):
        tensorboard_sources(["a,b", "c:d"])
    with pytest.raises(RunDirectoryError, match="x is no run directory"):
        tensorboard_sources(["c:d", "x"])
    RunDirectory.at("runs/e").create()
    assert tensorboard_sources(["c:d", "e"]) == [
        "--logdir_spec",
        f"c_d:{tmp_path}/runs/c:d/tensorboard,e:{tmp_path}/runs/e/tensorboard",
    ]
