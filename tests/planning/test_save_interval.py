"""How often to save: Daly's formula against the time lost in simulated runs, and what `plan` says of it."""

import json
import math
import random
from pathlib import Path

import pytest

from launcher.cli.plan import save_advice
from launcher.planning.save_interval import SaveCost, advise, best_interval, measured_cost
from launcher.run_directory import RunDirectory


def time_to_finish(work: float, interval: float, cost: float, mean: float, generator: random.Random) -> float:
    """Seconds that a run takes which saves at every interval and goes back to its last save at every failure."""
    now, saved, next_failure = 0.0, 0.0, generator.expovariate(1 / mean)
    while saved < work:
        end = now + interval + cost
        if next_failure < end:
            now = next_failure
            next_failure = now + generator.expovariate(1 / mean)
        else:
            now, saved = end, saved + interval
    return now


@pytest.mark.parametrize(("cost", "mean"), [(1.0, 500.0), (10.0, 500.0), (60.0, 300.0)])
def test_no_other_interval_is_better_in_simulated_runs(cost: float, mean: float) -> None:
    best = best_interval(cost, mean)
    work = 400 * mean

    def lost(interval: float) -> float:
        return time_to_finish(work, interval, cost, mean, random.Random(5))

    for factor in (0.4, 2.5):
        assert lost(best) < lost(best * factor)


def test_a_cheap_save_follows_young() -> None:
    assert best_interval(0.01, 1e6) == pytest.approx(math.sqrt(2 * 0.01 * 1e6), rel=1e-3)


def test_a_save_that_outlasts_the_machine_is_not_made_more_often_than_it_fails() -> None:
    assert best_interval(100, 40) == 40


def test_more_nodes_save_more_often_and_never_before_the_last_save_is_written() -> None:
    cost = SaveCost(blocked_seconds=0.5, seconds=30, step_seconds=2)
    one, many = advise(cost, 1, 1000), advise(cost, 100, 1000)
    assert one.save_steps == round(best_interval(0.5, 3.6e6) / 2)
    assert many.save_steps == pytest.approx(one.save_steps / 10, rel=0.01)
    assert many.lost_seconds == many.save_steps * 2 / 2 + 30
    assert many.overhead == pytest.approx(0.5 / many.seconds + many.lost_seconds / 36_000)
    assert advise(cost, 10**6, 1000).seconds == 30


@pytest.fixture
def measured(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory.at(tmp_path)
    saves = [(9.0, 90.0, True), (0.4, 5.0, True), (99.0, 99.0, False), (0.6, 7.0, True)]
    directory.saves.write_text(
        "".join(json.dumps({"blocked_seconds": b, "seconds": s, "saved": saved}) + "\n" for b, s, saved in saves)
    )
    directory.metrics.write_text('{"step": 1, "step_seconds": 3.0}\n{"step": 2, "eval_loss": 1.0}\n')
    return directory


def test_the_cost_is_the_median_of_later_saves_that_succeeded(measured: RunDirectory) -> None:
    assert measured_cost(measured) == SaveCost(blocked_seconds=0.5, seconds=6.0, step_seconds=3.0)


def test_what_plan_says(measured: RunDirectory, tmp_path: Path) -> None:
    text = save_advice(measured, 16, 2000) or ""
    assert text.startswith("save_steps=223 is best (every 669 s): a save holds training up for 0.5 s")
    assert "16 nodes of 2,000 h between failures fail every 125 h" in text
    assert "loses 340 s of work" in text
    none = RunDirectory.at("runs/none")
    assert save_advice(none, 1, None) is None
    assert save_advice(none, 1, 9.0) == f"how often is best follows from a run in {none.path} that has saved"
    assert save_advice(measured, 1, None) == "how often is best follows from hours_between_failures in the profile"
