"""Faults in real workers at real places: each run meets several, one after another, and ends as if there had been none.

A cell is a fault at a place. The default run has a representative part, --exhaustive has all cells. More faults:
test_driver_faults.py, test_node_faults.py, test_storage_faults.py.
"""

import json
import os
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from launcher.checkpoints.fault_plan import SWITCH
from launcher.orchestration.journal import read_account
from launcher.run_directory import RunDirectory, read_json_lines
from tests.orchestration.conftest import Zerofleet, records, wait_for, worker_pids
from tests.orchestration.fault_cells import (
    LENGTH,
    SAVE_STEPS,
    SETTINGS,
    Cell,
    check_account,
    incidents,
    names,
    steps_made_again,
)

pytestmark = [pytest.mark.ray, pytest.mark.distributed]

CATEGORIES = {
    "sigkill": "infrastructure",
    "exit": "infrastructure",
    "exception": "error",
    "memory": "infrastructure",
    "sigstop": "hang",
}
STARTS = ("phase.import", "phase.rendezvous", "phase.engine", "phase.load")
STEPS = ("phase.data", "phase.forward", "phase.agree", "phase.backward", "phase.optimizer")
SAVES = ("phase.save", "commit.gathered", "commit.renamed", "commit.synced")
REPRESENTATIVE = [
    Cell("exit", "phase.load"),
    Cell("exception", "phase.backward", rank=0, step=18),
    Cell("sigkill", "commit.renamed", rank=0),
    Cell("memory", "phase.evaluate", step=100),
]


def everywhere(number: int, fault: str) -> list[Cell]:
    """A fault at every place. Ranks differ by the fault, so that both meet each place; only rank 0 commits."""
    starts = [Cell(fault, point, rank=number % 2) for point in STARTS]
    steps = [Cell(fault, point, rank=(number + i) % 2, step=5 + 23 * i) for i, point in enumerate(STEPS)]
    saves = [Cell(fault, point, rank=0, step=125 if point == "phase.save" else None) for point in SAVES]
    return [*starts, *steps, *saves, Cell(fault, "phase.evaluate", rank=1, step=100)]


CHAINS = [
    REPRESENTATIVE,
    *(everywhere(number, fault) for number, fault in enumerate(("sigkill", "exit", "exception", "memory"))),
    [
        Cell("sigstop", "phase.engine"),
        *(Cell("sigstop", point, rank=i % 2, step=9 + 23 * i) for i, point in enumerate(STEPS)),
        Cell("sigstop", "phase.save", rank=0, step=125),
        Cell("sigstop", "phase.evaluate", rank=1, step=100),
    ],
]


def plan_file(folder: Path, entries: list[dict[str, Any]]) -> Path:
    path = folder / "faults.json"
    path.write_text(json.dumps(entries))
    return path


def check_nothing_is_left(directory: RunDirectory) -> None:
    for event in read_json_lines(directory.events):
        for worker in event.get("workers", []):
            wait_for(lambda pid=worker["pid"]: not psutil.pid_exists(pid), f"end of worker {worker['pid']}")


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chain", CHAINS, ids=names)
def test_faults_change_nothing_of_what_is_learned(
    chain: list[Cell],
    zerofleet: Zerofleet,
    uninterrupted: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = plan_file(tmp_path, [asdict(cell) for cell in chain])
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(path))
    directory = RunDirectory.at(tmp_path / "run")
    code, out, err = zerofleet.run(
        *("run", str(zerofleet.recipe), "--run-dir", str(directory.path), "--json"),
        *SETTINGS,
        # What stands still, while starting too. Elsewhere the defaults: a busy machine imports for half a minute.
        *(("hang_seconds=4", "stall_seconds=45") if any(cell.fault == "sigstop" for cell in chain) else ()),
        timeout=800,
    )
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["status"], summary["step"]) == ("complete", LENGTH)
    assert records(directory) == records(uninterrupted), "no sample lost or repeated, every loss the same"
    found = incidents(directory)
    assert sorted((event["rank"], event["category"]) for event in found) == sorted(
        (cell.rank, CATEGORIES[cell.fault]) for cell in chain
    ), "the rank that failed is named, not one that noticed"
    for event in found:
        assert event["step"] - event["saved_step"] <= SAVE_STEPS
    assert max(steps_made_again(directory)) <= SAVE_STEPS, "at most one save interval is lost"
    check_account(directory)
    assert len(read_account(directory).incidents) == len(chain)
    check_nothing_is_left(directory)


def test_a_stopped_rank_is_named_with_its_stacks_and_a_slow_one_too(
    zerofleet: Zerofleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rank stands there for a moment first: heartbeats are looked at once a second, and these steps are short.
    pause = {"fault": "slow", "point": "phase.data", "rank": 1, "step": 12, "steps": 1, "seconds": 2.5}
    stop = {"fault": "sigstop", "point": "phase.data", "rank": 1, "step": 12}
    # From here on data takes every rank a tenth of a second, and rank 0 three times that.
    data = {"fault": "slow", "point": "phase.data", "rank": None, "step": 30, "seconds": 0.1}
    slow = {**data, "rank": 0, "seconds": 0.2}
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(plan_file(tmp_path, [pause, stop, data, slow])))
    directory = RunDirectory.at(tmp_path / "run")
    code, _, err = zerofleet.run(
        *("run", str(zerofleet.recipe), "max_steps=60", "hang_seconds=12", "save_steps=10", "tensorboard=true"),
        *("--run-dir", str(directory.path)),
        timeout=240,
    )
    assert code == 0, err
    (event,) = incidents(directory)
    node = event["node"]
    assert (event["category"], event["rank"], event["phase"], event["step"]) == ("hang", 1, "data", 12)
    report = event["message"].splitlines()
    assert report[0].startswith(f"rank 1 on node {node} has been in data loading at step 12 for ")
    assert "and does not answer; 1 rank waits in agreeing on the batch" in report[0]
    assert report[0] in err
    stacks = (directory.logs / "hang-12" / "rank_00001.txt").read_text()
    assert "train (launcher/training/loop.py" in stacks, "where the rank stood"
    waiting = (directory.logs / "hang-12" / "rank_00000.txt").read_text()
    assert "train_step" in waiting
    (straggler,) = [e for e in read_json_lines(directory.events) if e["state"] == "straggler"]
    assert straggler["rank"] == 0
    assert 30 < straggler["step"] <= 50, "within 20 steps"
    assert 2 < straggler["factor"] <= 3.1
    assert straggler["message"] in err
    assert straggler["message"] in zerofleet.run("report", str(directory.path))[1]
    assert list((directory.tensorboard / "goodput").iterdir()), "the goodput is drawn"
    check_nothing_is_left(directory)


def test_a_bad_loss_ends_the_run_or_is_left_out(
    zerofleet: Zerofleet, uninterrupted: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nan = {"fault": "nan", "point": "", "rank": 1, "step": 33}
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(plan_file(tmp_path, [nan])))
    directory = RunDirectory.at(tmp_path / "run")
    run = ("run", str(zerofleet.recipe), "save_steps=25", "--run-dir", str(directory.path))
    code, _, err = zerofleet.run(*run)
    assert code == 2
    assert "the loss of step 33 is nan (samples 256 to 263)" in err
    assert "fault_tolerance.on_bad_loss: rollback" in err
    assert "Traceback" not in err
    (tmp_path / "faults.json.0").unlink()
    code, _, err = zerofleet.run(*run, "on_bad_loss=rollback")
    assert code == 0, err
    (event,) = incidents(directory)
    assert (event["category"], event["budget"], event["saved_step"]) == ("numeric", "numeric", 25)
    (skipped,) = read_json_lines(directory.skipped)
    assert {name: skipped[name] for name in ("step", "begin", "end")} == {"step": 33, "begin": 256, "end": 264}
    losses, samples = records(directory)
    true_losses, true_samples = records(uninterrupted)
    for step in range(1, 33):
        assert losses[step] == true_losses[step]
        assert samples[0, step] == true_samples[0, step]
    for step in range(33, 150):
        assert samples[0, step] == true_samples[0, step + 1], "one batch later than without the bad one"
    assert worker_pids(directory)
    check_nothing_is_left(directory)


def test_warm_spares_take_over(
    zerofleet: Zerofleet, uninterrupted: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = {"fault": "mark", "point": "phase.data", "rank": 0, "step": 60}
    plan = plan_file(tmp_path, [pause])
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(plan))
    directory = RunDirectory.at(tmp_path / "run")
    process = zerofleet.start(
        *("run", str(zerofleet.recipe), "warm_workers_after_seconds=0", "hang_seconds=200"),
        *("--run-dir", str(directory.path)),
    )
    wait_for(
        lambda: sum("warm" in log.read_text() for log in directory.logs.glob("spare_*")) == 2, "two spares", timeout=120
    )
    spares = {int(log.stem.rpartition("_")[2]) for log in directory.logs.glob("spare_*")}
    os.kill(worker_pids(directory)[1], signal.SIGKILL)
    Path(f"{plan}.0.go").touch()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert set(worker_pids(directory).values()) == spares
    assert records(directory) == records(uninterrupted)
    assert read_account(directory).seconds["recovery: import"] < read_account(directory).seconds["start-up: import"]
    check_nothing_is_left(directory)
    for pid in spares:
        wait_for(lambda pid=pid: not psutil.pid_exists(pid), f"end of spare {pid}")


def test_notice_of_the_end_is_kept_even_if_the_workers_cannot_save(
    zerofleet: Zerofleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = {"fault": "sigstop", "point": "phase.data", "rank": 1, "step": 60}
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(plan_file(tmp_path, [stop])))
    directory = RunDirectory.at(tmp_path / "run")
    run = ("run", str(zerofleet.recipe), "max_steps=80", "save_before_end_seconds=10", "--run-dir", str(directory.path))
    process = zerofleet.start(*run)
    wait_for(lambda: Path(tmp_path / "faults.json.0").exists(), "stopped rank")
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert "SIGUSR1: stopping" in err
    last = read_json_lines(directory.events)[-1]
    assert (last["state"], last["step"]) == ("stopped", 50)
    assert "did not save in time, the newest checkpoint is that of step 50" in last["reason"]
    check_nothing_is_left(directory)
    process = zerofleet.start(*run)
    assert process.communicate(timeout=120)[0]
    assert process.returncode == 0, "the same command goes on"
    starting = [e for e in read_json_lines(directory.events) if e["state"] == "starting"]
    assert len(starting) == 2


@pytest.mark.matrix
@pytest.mark.timeout(400)
@pytest.mark.parametrize("steps", [LENGTH, 2000])
def test_a_healthy_run_raises_no_alarm(
    steps: int, zerofleet: Zerofleet, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    """Steps of milliseconds, two ranks on the cores of a machine with other work to do: as jittery as it gets."""
    directory = uninterrupted
    if steps != LENGTH:
        directory = RunDirectory.at(tmp_path / "run")
        code, _, err = zerofleet.run(
            *("run", str(zerofleet.recipe), f"max_steps={steps}", "gradient_accumulation_steps=1"),
            *("micro_batch_size=1", "save_steps=1000", "logging_steps=100", "warm_workers=false"),
            *("--run-dir", str(directory.path)),
            timeout=380,
        )
        assert code == 0, err
    states = [event["state"] for event in read_json_lines(directory.events)]
    assert states == ["starting", "running", "complete"], "no straggler, no hang"
