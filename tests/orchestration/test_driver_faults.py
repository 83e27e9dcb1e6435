"""The driver is killed, or told that its machine will go, while a worker is at each place; the same command goes on."""

import json
import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from launcher.checkpoints.fault_plan import SWITCH
from launcher.run_directory import RunDirectory, read_json_lines
from tests.orchestration.conftest import Zerofleet, records, wait_for, worker_pids
from tests.orchestration.fault_cells import (
    LENGTH,
    PLACES,
    SAVE_STEPS,
    SETTINGS,
    Cell,
    Moments,
    check_account,
    names,
    steps_made_again,
)

pytestmark = [pytest.mark.ray, pytest.mark.distributed]

CHAINS = [
    [Cell("sigkill", "commit.renamed", 0)],
    [Cell("sigkill", *place) for place in PLACES],
    # A run that is told to end commits; so the place in a commit is met alone.
    [Cell("sigterm", *place) for place in PLACES if place[0] != "commit.renamed"],
    [Cell("sigterm", "commit.renamed", 0)],
]


@pytest.mark.matrix
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chain", CHAINS, ids=names)
def test_the_same_command_goes_on(
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
    met: list[int] = []
    while len(met) < len(chain):
        process = zerofleet.start(*command)
        met.append(moments.next(met))
        workers = worker_pids(directory).values()
        if chain[met[-1]].fault == "sigkill":
            process.kill()
            process.communicate()
        else:
            _stop(process, directory, moments, met[-1])
        for pid in workers:
            wait_for(lambda pid=pid: not psutil.pid_exists(pid), f"end of worker {pid}")
    code, out, err = zerofleet.run(*command)
    assert code == 0, err
    assert json.loads(out)["step"] == LENGTH
    assert records(directory) == records(uninterrupted), "no sample lost or repeated, every loss the same"
    states = [event["state"] for event in read_json_lines(directory.events)]
    kills = sum(cell.fault == "sigkill" for cell in chain)
    assert (states.count("interrupted"), states.count("stopped")) == (kills, len(chain) - kills)
    assert "recovering" not in states, "the workers were all well"
    again = steps_made_again(directory)
    assert len(again) <= kills, "what is told in time loses nothing"
    assert max(again, default=0) <= SAVE_STEPS, "at most one save interval is lost"
    check_account(directory)


def _stop(process: "subprocess.Popen[str]", directory: RunDirectory, moments: Moments, index: int) -> None:
    """Tell the driver that its machine will go, and let the worker go on once it knows."""
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: read_json_lines(directory.events)[-1]["state"] in ("draining", "saving"), "notice of the end")
    moments.release(index)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert "Traceback" not in err
