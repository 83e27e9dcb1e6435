"""A bad batch that is left out where the run is: no restart, no step made again, and a person is told."""

import json
from pathlib import Path

import pytest

from launcher.checkpoints.fault_plan import SWITCH
from launcher.run_directory import RunDirectory, read_json_lines
from tests.orchestration.conftest import Zerofleet, records
from tests.orchestration.fault_cells import check_account

pytestmark = [pytest.mark.ray, pytest.mark.distributed]


def test_a_bad_batch_is_left_out_without_a_restart(
    zerofleet: Zerofleet, uninterrupted: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "faults.json"
    plan.write_text(json.dumps([{"fault": "nan", "point": "", "rank": 1, "step": 33}]))
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(plan))
    directory = RunDirectory.at(tmp_path / "run")
    run = ("run", str(zerofleet.recipe), "--run-dir", str(directory.path), "on_bad_loss=skip", "max_steps=60")
    code, _, err = zerofleet.run(*run)
    assert code == 0, err
    assert (
        "the loss of step 33 is nan (samples 256 to 263); the step is not made, and these samples are left out" in err
    )
    assert [event["state"] for event in read_json_lines(directory.events)] == ["starting", "running", "complete"]
    (skipped,) = read_json_lines(directory.skipped)
    assert {name: skipped[name] for name in ("step", "begin", "end")} == {"step": 33, "begin": 256, "end": 264}
    losses, samples = records(directory)
    _, true_samples = records(uninterrupted)
    assert sorted(losses) == list(range(1, 61))
    for step in range(1, 33):
        assert samples[0, step] == true_samples[0, step]
    for step in range(33, 61):
        assert samples[0, step] == true_samples[0, step + 1], "one batch later than without the bad one"
    check_account(directory)
