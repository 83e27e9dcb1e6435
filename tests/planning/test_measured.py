"""The plan beside what a run measured."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.types import JobRecord, JobState, JobStatus
from launcher.cli.jobs import beside_plan
from launcher.cli.live import print_summary
from launcher.cli.plan_text import beside_lines
from launcher.jobs import JobView
from launcher.planning.layout import Resources
from launcher.planning.measured import beside, planned_memory, planned_seconds
from launcher.planning.plan import Plan, make_plan
from launcher.recipe.schema import Recipe
from launcher.run_directory import RunDirectory

MakeRecipe = Callable[..., Recipe]
METRICS: dict[str, Any] = {
    "step_seconds": 0.5, "memory_bytes": 2**30,
    "phase_seconds": {"data": 0.001, "forward": 0.1, "agree": 0.0, "backward": 0.3, "optimizer": 0.09},
}  # fmt: skip


def plan(make_recipe: MakeRecipe, changes: dict[str, Any] | None = None) -> Plan:
    return make_plan(make_recipe(changes), Resources(workers_per_node=2))


def test_the_phases_of_a_planned_step_add_up_to_it(make_recipe: MakeRecipe) -> None:
    for changes in ({}, {"training.gradient_checkpointing": True}):
        seconds = planned_seconds(plan(make_recipe, changes))
        assert seconds["step"] == pytest.approx(seconds["forward"] + seconds["backward"] + seconds["optimizer"])
        assert seconds["backward"] > (2.9 if changes else 1.9) * seconds["forward"]


def test_each_figure_stands_beside_its_own(make_recipe: MakeRecipe) -> None:
    made = plan(make_recipe)
    rows = {row.name: row for row in beside(made, METRICS)}
    assert made.step is not None
    assert (rows["a step"].planned, rows["a step"].measured) == (made.step.seconds, 0.5)
    assert rows["backward"].measured == 0.3
    assert rows["backward"].planned == planned_seconds(made)["backward"]
    assert rows["data"].planned is None
    assert (rows["memory of a rank"].planned, rows["memory of a rank"].measured) == (planned_memory(made), 2**30)
    lines = beside_lines(made, METRICS)
    assert lines[0].split() == ["planned", "measured"]
    assert lines[1].split()[-2:] == ["500", "ms"]
    assert len(lines) == 1 + len(rows)


def test_nothing_is_shown_before_anything_was_measured(make_recipe: MakeRecipe) -> None:
    assert beside_lines(plan(make_recipe), {}) == []


def test_a_pipeline_compares_the_whole_step_only(make_recipe: MakeRecipe) -> None:
    made = plan(make_recipe, {"parallel.pipeline_parallel_size": 2, "zero.stage": 1})
    assert set(planned_seconds(made)) == {"step"}


def test_offloaded_states_are_the_same_memory_on_cpu(make_recipe: MakeRecipe) -> None:
    made = plan(make_recipe, {"zero": {"stage": 2, "offload_optimizer": "cpu"}})
    assert made.ranks is not None
    (rank,) = made.ranks
    assert planned_memory(made) == rank.device_bytes + rank.host_bytes > rank.device_bytes


def test_the_closing_summary_shows_both(
    make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = {"status": "complete", "step": 10, "early_stopped": False, "seconds": 5.0, **METRICS}
    print_summary(summary, plan(make_recipe), RunDirectory.at(tmp_path))
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("a step ")]
    assert row.split()[-2:] == ["500", "ms"]


def test_status_shows_both_of_a_job(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(plan(make_recipe).model_dump_json())
    facts = dict.fromkeys(("id", "name", "backend", "backend_id", "job_directory"), "")
    record = JobRecord(**facts, argv=(), submitted=0.0, profile="", nodes=1, run_directory=str(tmp_path))
    view = JobView(record, JobStatus(JobState.RUNNING), {"metrics": METRICS}, {})
    assert any(line.split()[:2] == ["a", "step"] for line in beside_plan(view))
    (tmp_path / "plan.json").unlink()
    assert beside_plan(view) == []
