"""The table of a start's phases, the line of progress, and the observer that writes both for a job."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.orchestration.observers import JobObserver
from launcher.orchestration.progress import Pace, phase_table, progress_line, render_phases
from launcher.orchestration.states import GroupStatus, RunState
from launcher.run_directory import RunDirectory
from launcher.training.context import Beat, Phase

MOMENTS = {
    "submitted": 100.0,
    "started": 102.0,
    "ray_head": 107.0,
    "nodes_joined": 109.5,
    "starting": 110.0,
    "running": 112.0,
    "engine": 118.0,
    "data": 119.0,
    "first_step": 119.25,
}


def test_the_phases_of_a_start_add_up():
    table = phase_table(MOMENTS)
    assert table == {
        "queue": 2.0,
        "ray head": 5.0,
        "workers joined": 2.5,
        "driver and data": 0.5,
        "worker group": 2.0,
        "imports and rendezvous": 6.0,
        "engine": 1.0,
        "first step": 0.25,
        "in all": 19.25,
    }
    assert render_phases(table).splitlines()[1] == "  ray head                    5.00 s"


def test_a_start_that_is_not_over_shows_what_is():
    known = {name: MOMENTS[name] for name in ("submitted", "started", "ray_head")}
    assert phase_table(known) == {"queue": 2.0, "ray head": 5.0}
    assert phase_table({}) == {}
    assert phase_table({"submitted": 1.0}) == {}


def test_on_a_cluster_that_was_there_before():
    known = {name: moment for name, moment in MOMENTS.items() if name not in ("started", "ray_head", "nodes_joined")}
    assert list(phase_table(known))[:2] == ["driver and data", "worker group"]
    assert phase_table(known)["driver and data"] == 10.0


def test_moments_of_another_start_make_no_negative_time():
    assert "ray head" not in phase_table({**MOMENTS, "started": 108.0})


def test_the_line():
    metrics = {"loss": 2.5, "learning_rate": 1e-4, "tokens_per_second": 12345.6, "memory_bytes": 3 * 2**30}
    line = "step 5/20 | loss 2.5000 | lr 1.00e-04 | 12,346 tokens/s | 3.0 GiB/rank | ETA 01:15 | forward"
    assert progress_line(5, 20, metrics, "forward", 75) == line
    assert progress_line(0, 0, {}, "import") == "import"


def test_the_pace_is_that_of_the_last_looks():
    pace = Pace()
    assert pace.remaining(0.0, 0, 100) is None
    assert pace.remaining(10.0, 10, 100) == pytest.approx(90.0)
    assert pace.remaining(20.0, 10, 100) == pytest.approx(180.0)


BEAT = Beat(0, 3, Phase.FORWARD, 0.0, {"loss": 2.5}, 10, {"engine": 118.0, "data": 119.0, "first_step": 119.25})


def test_a_jobs_observer_tells_the_file_and_the_log(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("ZEROFLEET_PHASES", json.dumps({name: MOMENTS[name] for name in list(MOMENTS)[:4]}))
    observer = JobObserver(RunDirectory.at(tmp_path))
    observer.moments.update(starting=110.0, running=112.0)
    observer.event(RunState.RUNNING, {"attempt": 2})
    observer.progress(GroupStatus({0: BEAT}))
    found = json.loads((tmp_path / "progress.json").read_text())
    assert (found["state"], found["attempt"], found["step"], found["max_steps"]) == ("running", 2, 3, 10)
    assert phase_table(found["moments"]) == phase_table(MOMENTS)
    log = capsys.readouterr().out
    assert "the first step is made; it took\n  queue                       2.00 s\n" in log
    assert "step 3/10 | loss 2.5000 | forward" in log
    observer.progress(GroupStatus({0: replace(BEAT, step=4)}))
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 3, "once a second is enough"
    observer.event(RunState.COMPLETE, {"attempt": 2})
    observer.progress(GroupStatus({0: replace(BEAT, step=10)}))
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 10, "but the end is always told"
    assert capsys.readouterr().out.count("the first step is made") == 0
