"""`zerofleet run` as a user meets it: real Ray, real DeepSpeed workers, real signals."""

import json
import os
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from launcher.checkpoints import folders
from launcher.checkpoints.fault_plan import SWITCH
from launcher.checkpoints.manifest import read_manifest
from launcher.orchestration.journal import read_account
from launcher.run_directory import RunDirectory, read_json_lines
from tests.orchestration.conftest import Zerofleet, records, wait_for, wait_for_step, worker_pids
from tests.support.s3 import BUCKET, s3_server

pytestmark = [pytest.mark.ray, pytest.mark.distributed]


def test_a_killed_worker_is_replaced_and_nothing_changes(
    zerofleet: Zerofleet, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    directory = RunDirectory.at(tmp_path / "run")
    process = zerofleet.start("run", str(zerofleet.recipe), "--run-dir", str(directory.path))
    began = psutil.Process(process.pid).create_time()
    wait_for_step(directory, 7)
    victim = worker_pids(directory)[1]
    os.kill(victim, signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    events = read_json_lines(directory.events)
    (recovering,) = [event for event in events if event["state"] == "recovering"]
    assert (recovering["rank"], recovering["kind"]) == (1, "died"), "the killed rank is the cause, not its peer's echo"
    assert records(directory) == records(uninterrupted)
    attempts = read_json_lines(directory.attempts)
    assert [(attempt["attempt"], attempt["outcome"]) for attempt in attempts] == [(1, "recovering"), (2, "complete")]
    check_account(directory, began, time.time())
    assert "resuming" not in err  # the driver says so only when it starts on an old run
    for pid in worker_pids(directory).values():
        wait_for(lambda pid=pid: not psutil.pid_exists(pid), f"end of worker {pid}")


def check_account(directory: RunDirectory, began: float, ended: float) -> None:
    """The account covers the command's life from its first moment to the run's end, and its parts add up."""
    found = read_account(directory)
    assert sum(found.seconds.values()) == pytest.approx(found.wall, rel=1e-3)
    assert found.spans[0].begin == pytest.approx(began, abs=0.1)
    assert found.spans[-1].end <= ended
    (incident,) = found.incidents
    assert 0 < found.cost(incident) < found.wall
    assert {"training", "checkpoint", "lost work", "recovery: import", "start-up: import"} <= set(found.seconds)


def interrupted(zerofleet: Zerofleet, directory: RunDirectory, *arguments: str) -> tuple[int, str, str]:
    """Run, and Ctrl-C after a few steps; slow ones, so that the run is not over before it is heard."""
    plan = directory.path.with_name("slow.json")
    plan.write_text(json.dumps([{"fault": "slow", "point": "phase.data", "rank": 0, "seconds": 0.1}]))
    fast, zerofleet.environment = zerofleet.environment, {**zerofleet.environment, SWITCH: str(plan)}
    process = zerofleet.start("run", str(zerofleet.recipe), "--run-dir", str(directory.path), *arguments)
    zerofleet.environment = fast
    wait_for_step(directory, 6)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_ctrl_c_saves_and_the_same_command_continues(
    zerofleet: Zerofleet, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    directory = RunDirectory.at(tmp_path / "run")
    code, out, err = interrupted(zerofleet, directory)
    assert code == 130, err
    assert "stopped and saved at step" in out
    assert "Traceback" not in err
    newest = folders.complete(directory.checkpoints)[-1]
    step = read_manifest(newest).step
    assert 6 <= step < 150
    assert not directory.summary.exists()
    summary = zerofleet.train(directory.path)
    assert (summary["status"], summary["step"]) == ("complete", 150)
    assert records(directory) == records(uninterrupted)
    again = zerofleet.train(directory.path)
    assert again["already_complete"]
    assert len(read_json_lines(directory.attempts)) == 2, "a complete run starts no worker"


def test_another_machine_goes_on_from_an_s3_server_alone(
    zerofleet: Zerofleet, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    with s3_server(tmp_path / "s3.log") as environment:
        zerofleet.environment = zerofleet.environment | environment
        elsewhere = f"checkpoint.directory=s3://{BUCKET}/run"
        lost = RunDirectory.at(tmp_path / "lost")
        code, _, err = interrupted(zerofleet, lost, elsewhere)
        assert code == 130, err
        step = folders.step_of(folders.complete(lost.checkpoints)[-1])
        shutil.rmtree(lost.path)
        directory = RunDirectory.at(tmp_path / "run")
        code, _, err = zerofleet.run("run", str(zerofleet.recipe), elsewhere, "--run-dir", str(directory.path))
        assert code == 0, err
        assert f"fetched step_{step:08} from s3://{BUCKET}/run" in err
    losses, samples = records(uninterrupted)
    assert records(directory) == (
        {at: loss for at, loss in losses.items() if at > step},
        {(rank, at): ids for (rank, at), ids in samples.items() if at > step},
    )


def test_a_second_ctrl_c_ends_at_once(zerofleet: Zerofleet, tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path / "run")
    process = zerofleet.start("run", str(zerofleet.recipe), "max_steps=100000", "--run-dir", str(directory.path))
    wait_for_step(directory, 2)
    pids = worker_pids(directory)
    os.kill(pids[0], signal.SIGSTOP)  # now no step can end, so the first Ctrl-C alone would wait
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "draining" in [event["state"] for event in read_json_lines(directory.events)], "the first one")
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "ended at once" in err
    for pid in pids.values():
        wait_for(lambda pid=pid: not psutil.pid_exists(pid), f"end of worker {pid}")


def test_an_exception_in_a_worker_is_shown_whole_and_first(zerofleet: Zerofleet, tmp_path: Path) -> None:
    """A real failure inside the forward pass: rows whose token ids the model does not have."""
    directory = RunDirectory.at(tmp_path / "run")
    cache = tmp_path / "cache"
    own_data = f"data.cache_directory={cache}"
    zerofleet.train(directory.path, own_data, "max_steps=1")
    for path in cache.rglob("tokens.npy"):
        rows = np.load(path, mmap_mode="r+")
        rows[:] = 60_000
        rows.flush()
    code, _, err = zerofleet.run(
        *("run", str(zerofleet.recipe), own_data, "max_steps=3", "max_restarts=1", "--run-dir", str(directory.path))
    )
    assert code == 2
    lines = err.splitlines()
    first = next(index for index, line in enumerate(lines) if "failed at step" in line)
    assert "IndexError: index out of range in self" in lines[first]
    assert lines[first + 1] == "Traceback (most recent call last):"
    assert any("causal_lm.py" in line for line in lines)
    # On a busy machine the node may be slow to say that it is there, and is waited for.
    states = [event["state"] for event in read_json_lines(directory.events) if event["state"] != "waiting"][-5:]
    assert states == ["starting", "running", "recovering", "running", "failed"]


def test_more_workers_than_the_cluster_has(zerofleet: Zerofleet, tmp_path: Path) -> None:
    profile = tmp_path / "big.yaml"
    profile.write_text("name: big\nbackend: local\nworkers_per_node: 64\n")
    code, _, err = zerofleet.run(
        *("run", str(zerofleet.recipe), "--profile", str(profile), "--run-dir", str(tmp_path / "run")),
        "gradient_accumulation_steps=null",
        "global_batch_size=128",
    )
    assert code == 2, err
    assert "asks for 1 node(s) with 64 CPU each" in err
    assert "has 4 CPU" in err
    assert "Traceback" not in err


def test_a_refused_model_is_an_error_without_a_traceback(zerofleet: Zerofleet, tmp_path: Path) -> None:
    code, _, err = zerofleet.run(
        *("run", str(zerofleet.recipe), "--run-dir", str(tmp_path / "run")), "model.config.hidden_act=no_such_act"
    )
    assert code == 2
    assert "transformers" in err
    assert "no_such_act" in err
    assert "Traceback" not in err


def test_another_model_in_the_same_run_directory_is_refused(zerofleet: Zerofleet, tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path / "run")
    zerofleet.train(directory.path, "max_steps=1")
    code, _, err = zerofleet.run(
        *("run", str(zerofleet.recipe), "--run-dir", str(directory.path)), "max_steps=2", "model.config.hidden_size=64"
    )
    assert code == 2
    assert "model.config.hidden_size: 32 in the checkpoint, 64 in the recipe" in err
    assert "Traceback" not in err
    code, _, err = zerofleet.run(
        *("run", str(zerofleet.recipe), "--run-dir", str(directory.path)), "max_steps=1", "data.sequence_length=16"
    )
    assert code == 2, "a complete run is no answer to another recipe"
    assert "data.sequence_length: 32 in the checkpoint, 16 in the recipe" in err
    summary = zerofleet.train(directory.path, "max_steps=2")
    assert summary["step"] == 2, "the run directory stays usable"


def test_an_unwritable_run_directory(zerofleet: Zerofleet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    code, _, err = zerofleet.run("run", str(zerofleet.recipe), "--run-dir", str(tmp_path / "file" / "run"))
    assert code == 2
    assert "cannot be written" in err
    assert "--run-dir" in err


def test_no_ray_at_the_address(zerofleet: Zerofleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zerofleet.environment, "RAY_ADDRESS", "nonsense")
    code, _, err = zerofleet.run("run", str(zerofleet.recipe), "--run-dir", str(tmp_path / "run"))
    assert code == 2
    assert "RAY_ADDRESS=nonsense is not of the form HOST:PORT" in err


AT_EXIT = """
import atexit, os, pathlib
atexit.register(lambda: pathlib.Path({folder!r}, str(os.getpid())).touch())
"""


def test_a_cold_start_needs_nothing_but_the_command(tiny_recipe: Path, tmp_path: Path) -> None:
    """The embedded Ray comes, trains, exports and leaves no process and no folder behind."""
    exits = tmp_path / "exits"
    exits.mkdir()
    (tmp_path / "sitecustomize.py").write_text(AT_EXIT.format(folder=str(exits)))
    environment = {"RAY_ADDRESS": "", "PYTHONPATH": str(tmp_path), "COLD_START": str(tmp_path)}
    command = Zerofleet(tiny_recipe, environment)
    directory = RunDirectory.at(tmp_path / "run")
    code, out, err = command.run("run", str(tiny_recipe), "max_steps=2", "--run-dir", str(directory.path))
    assert code == 0, err
    assert "complete, 2 steps" in out
    assert "unigram baseline" in out
    assert "step 2/2" in err or "workers started" in err

    def of_command(process: psutil.Process) -> bool:
        with suppress(psutil.Error):
            return process.environ().get("COLD_START") == str(tmp_path)
        return False  # it has ended, or is not ours to ask

    ended = {int(path.name) for path in exits.iterdir()}
    assert set(worker_pids(directory).values()) <= ended, "what a worker registered for its exit is run"
    left = [process for process in psutil.process_iter() if of_command(process)]
    assert left == []
    code, out, _ = command.run("export", str(directory.path), "--json")
    assert code == 0
    assert json.loads(out) == {"step": 2, "export": str(directory.export)}
    assert (directory.export / "model.safetensors").is_file()
    code, _, err = command.run("export", str(directory.path), "--step", "9")
    assert code == 2
    assert "there are steps 2" in err
