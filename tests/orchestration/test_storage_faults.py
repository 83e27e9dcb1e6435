"""The disk is full, or a checkpoint's shard cut short, while a worker is at each place."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from launcher.checkpoints import folders
from launcher.checkpoints.fault_plan import SWITCH
from launcher.run_directory import RunDirectory, read_json_lines
from tests.orchestration.conftest import Zerofleet, records, small_disk, wait_for, worker_pids
from tests.orchestration.fault_cells import (
    LENGTH,
    SAVE_STEPS,
    SETTINGS,
    Cell,
    Moments,
    check_account,
    incidents,
    names,
    steps_made_again,
)

pytestmark = [pytest.mark.ray, pytest.mark.distributed]

FULL = [
    [Cell("full disk", "phase.save", 0, 75)],
    [  # Each run ends with the next save, so that none comes to a second place.
        Cell("full disk", "phase.engine", 1),
        Cell("full disk", "commit.gathered", 0),
        Cell("full disk", "phase.data", 1, 40),
        Cell("full disk", "phase.forward", 0, 65),
        Cell("full disk", "phase.backward", 1, 90),
        Cell("full disk", "phase.save", 0, 125),
        Cell("full disk", "phase.evaluate", 1, 150),
    ],
]
CUT_SHORT = [
    [Cell("cut short while down", "phase.backward", 0, 60)],
    [Cell("cut short", "phase.data", 1, 60), Cell("cut short", "phase.forward", 0, 110)],
    [Cell("cut short", "phase.backward", 1, 57), Cell("cut short", "phase.save", 0, 100)],
    [Cell("cut short", "commit.synced", 0, 3), Cell("cut short", "phase.evaluate", 1, 150)],
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """What a test can fill."""
    with small_disk(tmp_path / "small", "24m") as folder:
        yield folder


def fill(ballast: Path) -> None:
    """Leave no byte free."""
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            return


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chain", FULL, ids=names)
def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(
    chain: list[Cell],
    zerofleet: Zerofleet,
    uninterrupted: RunDirectory,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = Moments.of(chain, tmp_path)
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(moments.plan))
    directory = RunDirectory.at(disk / "run")
    command = ("run", str(zerofleet.recipe), "--run-dir", str(directory.path), "--json", *SETTINGS)
    command += ("max_failed_saves=0",)
    met: list[int] = []
    while len(met) < len(chain):
        process = zerofleet.start(*command)
        met.append(moments.next(met))
        workers = worker_pids(directory).values()
        fill(disk / "ballast")
        moments.release(met[-1])
        _, err = process.communicate(timeout=120)
        assert process.returncode == 2, err
        assert "No space left on device" in err
        assert "Traceback" not in err
        for pid in workers:
            wait_for(lambda pid=pid: not psutil.pid_exists(pid), f"end of worker {pid}")
        (disk / "ballast").unlink()
    code, out, err = zerofleet.run(*command)
    assert code == 0, err
    assert json.loads(out)["step"] == LENGTH
    assert records(directory) == records(uninterrupted), "no sample lost or repeated, every loss the same"
    assert max(steps_made_again(directory), default=0) <= SAVE_STEPS, "at most one save interval is lost"


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chain", CUT_SHORT, ids=names)
def test_a_checkpoint_cut_short_is_set_aside_for_the_one_before_it(
    chain: list[Cell],
    zerofleet: Zerofleet,
    uninterrupted: RunDirectory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    moments = Moments.of(chain, tmp_path)
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(moments.plan))
    directory = RunDirectory.at(tmp_path / "run")
    command = ("run", str(zerofleet.recipe), "--run-dir", str(directory.path), "--json", *SETTINGS)
    process = zerofleet.start(*command)
    met: list[int] = []
    cut: list[Path] = []
    while len(met) < len(chain):
        met.append(moments.next(met))
        cell, deaths = chain[met[-1]], len(incidents(directory))
        newest = folders.complete(directory.checkpoints)[-1]
        shards = sorted(newest.rglob("*.pt"))
        shard = shards[len(cut) % len(shards)]
        cut.append(newest)
        if cell.fault == "cut short while down":
            process.kill()
            process.communicate()
        os.truncate(shard, shard.stat().st_size // 2)
        if cell.fault == "cut short while down":
            process = zerofleet.start(*command)
            continue
        os.kill(worker_pids(directory)[cell.rank], signal.SIGKILL)
        wait_for(lambda deaths=deaths: len(incidents(directory)) > deaths, "notice of the death")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(out)["step"] == LENGTH
    assert records(directory) == records(uninterrupted), "no sample lost or repeated, every loss the same"
    for folder in cut:
        assert folder.with_name(f"{folder.name}.damaged").exists(), "kept for people"
        assert f"checkpoint {folder.name} is damaged" in directory.driver_log.read_text()
    assert max(steps_made_again(directory)) <= 2 * SAVE_STEPS, "an interval, and the one whose checkpoint was cut"
    deaths = sum(cell.fault == "cut short" for cell in chain)
    assert [event["category"] for event in incidents(directory)] == ["infrastructure"] * deaths
    check_account(directory)
    for event in read_json_lines(directory.events):
        for worker in event.get("workers", []):
            wait_for(lambda pid=worker["pid"]: not psutil.pid_exists(pid), f"end of worker {worker['pid']}")
