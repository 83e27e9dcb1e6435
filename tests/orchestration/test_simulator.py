"""The real supervisor over simulated clusters: against the closed formula, and on what the formula does not know."""

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from launcher.cli.main import app
from launcher.orchestration.scenario import Scenario
from launcher.orchestration.simulated_group import KeptInMemory
from launcher.orchestration.simulator import (
    best_interval,
    expected_goodput,
    mean_hours_between_failures,
    recommend,
    simulate,
)
from launcher.recipe.run_sections import FaultToleranceSection

PATIENT = FaultToleranceSection(
    max_restarts=10**6, max_start_failures=10**6, exclude_node_after=None, restart_delay_seconds=0
)
RATE = 6.5e-3
"""Failures per node-day of Meta's RSC-1 (Kokolis et al., arXiv 2410.21680)."""


def test_the_published_times_between_failures() -> None:
    assert mean_hours_between_failures(16_384 // 8, RATE) == pytest.approx(1.8, abs=0.05)
    assert mean_hours_between_failures(131_072 // 8, RATE) == pytest.approx(0.23, abs=0.006)


@pytest.mark.parametrize(("gpus", "hours", "days"), [(16_384, 1.8, 60), (131_072, 0.23, 5)])
def test_the_simulated_failures_come_as_often(gpus: int, hours: float, days: float) -> None:
    found = simulate(Scenario(gpus // 8, 1 / RATE, days=days, start_seconds=10, save_steps=5, save_seconds=1), PATIENT)
    assert found.hours_between_failures == pytest.approx(hours, rel=0.05)


@pytest.mark.parametrize(
    ("nodes", "save_steps", "save_seconds", "start_seconds"),
    [(128, 100, 30, 120), (256, 180, 60, 300), (1024, 30, 6, 60), (2048, 60, 6, 60)],
)
def test_the_goodput_is_that_of_the_closed_formula(
    nodes: int, save_steps: int, save_seconds: float, start_seconds: float
) -> None:
    scenario = Scenario(
        nodes, 1 / RATE, days=60, save_steps=save_steps, save_seconds=save_seconds, start_seconds=start_seconds
    )
    restart = start_seconds + scenario.detect_seconds + scenario.teardown_seconds
    expected = expected_goodput(nodes, RATE, save_seconds, restart, save_steps * scenario.step_seconds)
    found = simulate(scenario, PATIENT)
    assert found.ended == "complete"
    assert found.goodput == pytest.approx(expected, rel=0.05)
    assert 1 - found.goodput == pytest.approx(1 - expected, rel=0.25), "what is lost, too, is what the formula says"
    assert sum(found.account.seconds.values()) == pytest.approx(found.account.wall)


@pytest.mark.parametrize(
    ("nodes", "memory_steps", "save_steps", "save_seconds"), [(256, 20, 400, 60), (1024, 5, 200, 30), (2048, 6, 120, 6)]
)
def test_with_states_in_memory_the_goodput_is_that_of_their_interval(
    nodes: int, memory_steps: int, save_steps: int, save_seconds: float
) -> None:
    scenario = Scenario(
        nodes,
        1 / RATE,
        days=60,
        save_steps=save_steps,
        save_seconds=save_seconds,
        start_seconds=60,
        memory_steps=memory_steps,
        memory_seconds=1.5,
    )
    restart = scenario.start_seconds + scenario.detect_seconds + scenario.teardown_seconds
    stops = scenario.memory_seconds + save_seconds * memory_steps / save_steps  # of each interval
    expected = expected_goodput(nodes, RATE, stops, restart, memory_steps * scenario.step_seconds)
    found, without = simulate(scenario, PATIENT), simulate(replace(scenario, memory_steps=None), PATIENT)
    assert found.goodput == pytest.approx(expected, rel=0.05)
    assert 1 - found.goodput == pytest.approx(1 - expected, rel=0.25), "what is lost, too, is what the formula says"
    assert found.account.seconds["lost work"] < without.account.seconds["lost work"] / 5
    assert found.progress == pytest.approx(found.goodput, abs=0.005), "no work is lost that was taken for kept"
    for event in found.events:
        if event["state"] == "recovering" and "kept_step" in event:
            assert event["step"] - event["kept_step"] <= memory_steps


def test_two_neighbours_that_die_before_the_next_state_leave_the_disk() -> None:
    kept = KeptInMemory()
    ring = tuple(f"n{index}" for index in range(5))
    kept.keep(10, ring)
    for node in ("n0", "n2", "n0", "strange"):
        kept.lose(node)
        assert kept.step == 10, "each part is with the node that made it or with the next one"
    kept.lose("n4")
    assert kept.step == 0, "n4's part was on n4 and on n0"
    kept.keep(20, ring)
    kept.lose("n4")
    assert kept.step == 20
    kept.keep(30, ("n1",))
    kept.lose("n1")
    assert kept.step == 0, "a node alone has no neighbour"


@pytest.mark.parametrize("memory_steps", [None, 7])
def test_the_same_seed_gives_the_same_events(memory_steps: int | None) -> None:
    scenario = Scenario(
        512, 20, days=5, spare_nodes=4, hang_share=0.3, preemptions_per_node_day=0.01, slow_node_days=200, seed=3
    )
    scenario = replace(scenario, memory_steps=memory_steps)
    first, second = (simulate(scenario, PATIENT).events for _ in range(2))
    assert json.dumps(first) == json.dumps(second)
    assert json.dumps(simulate(replace(scenario, seed=4), PATIENT).events) != json.dumps(first)


def test_hangs_cost_the_time_to_notice_them() -> None:
    scenario = Scenario(256, 10, days=10)
    dying, hanging = simulate(scenario, PATIENT), simulate(replace(scenario, hang_share=1.0), PATIENT)
    hangs = [event for event in hanging.events if event["state"] == "recovering"]
    assert len(hangs) > 100
    assert {event["category"] for event in hangs} == {"hang"}
    assert hanging.goodput < dying.goodput


def test_slow_nodes_and_preemptions_cost_goodput() -> None:
    calm = Scenario(256, 1e6, days=10)
    taken = simulate(replace(calm, preemptions_per_node_day=0.02), PATIENT)
    assert {event["budget"] for event in taken.events if event["state"] == "recovering"} == {"preemption"}
    steps = [
        max(event["ledger"]["step"] for event in simulate(scenario, PATIENT).events if "ledger" in event)
        for scenario in (calm, replace(calm, slow_node_days=256.0, slow_hours=6))
    ]
    assert steps[1] == pytest.approx(steps[0] * (1 - 0.5 * 0.22), rel=0.08), "a fifth of the time at half the speed"


def test_without_spares_the_run_waits_or_gives_up() -> None:
    scenario = Scenario(64, 10, days=10, spare_nodes=0, repair_hours=2)
    waiting = simulate(scenario, PATIENT.model_copy(update={"wait_for_nodes_seconds": 1e6}))
    assert waiting.ended == "complete"
    share = waiting.account.seconds["idle: waiting for nodes"] / waiting.account.wall
    assert share > 0.25, "six failures a day, each of which stops the run for two hours"
    spared = simulate(replace(scenario, spare_nodes=6), PATIENT)
    assert spared.goodput > waiting.goodput + 0.25
    impatient = simulate(scenario, PATIENT)
    assert impatient.ended == "failed"
    assert "wait_for_nodes_seconds 600" in impatient.reason


def test_a_budget_that_is_too_small_for_the_cluster_shows() -> None:
    found = simulate(Scenario(16_384, 1 / RATE, days=10, save_steps=360, save_seconds=60), FaultToleranceSection())
    assert found.ended == "failed"
    assert "max_restarts 3" in found.reason


def test_a_node_that_breaks_often_is_left_out_when_there_is_another() -> None:
    settings = PATIENT.model_copy(update={"exclude_node_after": 2})
    found = simulate(Scenario(8, 2, days=30, spare_nodes=4, repair_hours=1), settings)
    excluded = [event["excluded"] for event in found.events if "excluded" in event]
    assert excluded
    assert found.ended == "complete"


def test_what_is_recommended() -> None:
    scenario = Scenario(1024, 1 / RATE, days=30, save_steps=2000, save_seconds=20, repair_hours=48)
    found = recommend(scenario, PATIENT)
    ideal = best_interval(1024, RATE, 20) / scenario.step_seconds
    assert ideal / 2.1 <= found.save_steps <= ideal * 2.1
    assert found.tried[found.save_steps] > found.tried[2000]
    in_repair = 1024 * RATE * 2
    assert in_repair < found.spare_nodes < in_repair + 4 * in_repair**0.5


def test_an_elastic_run_shrinks_grows_and_loses_less() -> None:
    scenario = Scenario(64, 20, days=20, spare_nodes=1, repair_hours=12, save_steps=30, save_seconds=5)
    patient = PATIENT.model_copy(update={"wait_for_nodes_seconds": 1e6})
    rigid, elastic = simulate(scenario, patient), simulate(replace(scenario, min_nodes=32), patient)
    sizes = [event["nodes"] for event in elastic.events if event["state"] == "resizing"]
    assert 64 in sizes
    assert min(sizes) < 64
    assert elastic.progress > rigid.progress + 0.05
    assert "idle: waiting for nodes" not in elastic.account.seconds
    assert sum(elastic.account.seconds.values()) == pytest.approx(elastic.account.wall)
    found = recommend(scenario, patient)
    assert (found.rigid_progress, found.elastic_progress) == (rigid.progress, elastic.progress)
    assert rigid.progress == pytest.approx(rigid.goodput, abs=0.005), "on all nodes, time and steps say the same"


def test_the_command(tmp_path) -> None:
    runner = CliRunner()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: r\nmodel: {model_name_or_path: gpt2}\ndata: {sequence_length: 8, sources: [{type: text, files: [x]}]}\n"
        "training: {max_steps: 1, micro_batch_size: 1}\ncheckpoint: {save_steps: 40}\n"
        "fault_tolerance: {max_restarts: 9}\n"
    )
    arguments = ["simulate", "--nodes", "2048", "--mtbf-node-days", "154", "--days", "2", "--recipe", str(recipe)]
    shown = runner.invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert "2048 nodes for 2 days, a checkpoint every 40 steps of 10 s: goodput" in shown.output
    assert "<- recommended" in shown.output
    found = json.loads(runner.invoke(app, [*arguments, "--json", "--seed", "1"]).output)
    assert found["scenario"]["save_steps"] == 40
    assert 0.5 < found["goodput"] < 1
    kept = [*arguments, "--memory-steps", "5", "--json", "--seed", "1"]
    assert json.loads(runner.invoke(app, kept).output)["goodput"] > found["goodput"]
    local = runner.invoke(app, ["simulate", "--profile", "local", "--days", "1"])
    assert "1 nodes for 1 days" in local.output
    assert runner.invoke(app, ["simulate"]).exit_code != 0
