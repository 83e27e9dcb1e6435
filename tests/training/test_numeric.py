"""Bad losses are noticed one step later, on every rank alike, and left out the next time."""

import math
from pathlib import Path

import pytest

from launcher.run_directory import RunDirectory, read_json_lines
from tests.support.ranks import Ranks

pytestmark = pytest.mark.distributed

USUAL = [3.0 + 0.01 * math.sin(step) for step in range(30)]


def watch(ranks: Ranks, folder: Path, losses: list[float], **settings: object) -> dict[str, object]:
    found = ranks.call("cases:watch_losses", run_directory=str(folder), losses=losses, **settings)
    assert all(result == found[0] for result in found), "all ranks agree"
    return dict(found[0])


def test_usual_losses_pass(two_ranks: Ranks, tmp_path: Path) -> None:
    assert watch(two_ranks, tmp_path, USUAL, loss_spike_factor=1.5) == {"step": None, "text": ""}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stops_the_run_one_step_later(two_ranks: Ranks, tmp_path: Path, bad: float) -> None:
    found = watch(two_ranks, tmp_path, [*USUAL[:5], bad, *USUAL])
    assert found["step"] == 7
    assert str(found["text"]).startswith(f"the loss of step 6 is {bad} (samples 20 to 23). Set fault_tolerance.")
    assert not RunDirectory.at(tmp_path).skipped.exists()


def test_a_spike_is_measured_against_the_steps_before(two_ranks: Ranks, tmp_path: Path) -> None:
    spiked = [*USUAL[:20], 11.0, *USUAL]
    assert watch(two_ranks, tmp_path, spiked)["step"] is None, "by default only what is no number is bad"
    assert watch(two_ranks, tmp_path, [*USUAL[:5], 11.0, *USUAL], loss_spike_factor=2.0)["step"] is None
    found = watch(two_ranks, tmp_path, spiked, loss_spike_factor=2.0)
    assert found["step"] == 22
    assert "step 21 is 7.0000, more than 2 times the median 3.00" in str(found["text"])


def test_what_was_bad_is_recorded_and_left_out(two_ranks: Ranks, tmp_path: Path) -> None:
    losses = [*USUAL[:5], math.nan, *USUAL]
    assert watch(two_ranks, tmp_path, losses, on_bad_loss="rollback")["step"] == 7
    records = read_json_lines(RunDirectory.at(tmp_path).skipped)
    assert records == [{"step": 6, "begin": 20, "end": 24, "loss": "nan"}]
    assert watch(two_ranks, tmp_path, losses, on_bad_loss="rollback")["step"] is None
    assert len(read_json_lines(RunDirectory.at(tmp_path).skipped)) == 1


def test_the_last_step_is_judged_before_it_is_saved(two_ranks: Ranks, tmp_path: Path) -> None:
    found = watch(two_ranks, tmp_path, [*USUAL, math.nan])
    assert found["step"] == 32
