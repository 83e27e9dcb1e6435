"""`zerofleet simulate`: the goodput to expect of a run on a cluster that fails."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.orchestration.progress import readable_seconds

if TYPE_CHECKING:
    from launcher.orchestration.simulator import Recommendation, Simulation


def simulate(
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of the run. Default: the profile's.")] = None,
    mtbf_node_days: Annotated[float, typer.Option(min=0.01, help="Mean days between two failures of a node.")] = 154.0,
    recipe: Annotated[str | None, typer.Option(help="Recipe, for fault_tolerance and checkpoint.save_steps.")] = None,
    profile: Annotated[str | None, typer.Option(help="Profile, for the number of nodes.")] = None,
    days: Annotated[float, typer.Option(min=0.01, help="Days to simulate.")] = 30.0,
    step_seconds: Annotated[float, typer.Option(min=0.001, help="Length of an optimizer step.")] = 10.0,
    save_steps: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's, or the best interval.")] = None,
    save_seconds: Annotated[float, typer.Option(min=0, help="For which a checkpoint stops training.")] = 30.0,
    memory_steps: Annotated[int | None, typer.Option(min=1, help="Steps between two states in host memory.")] = None,
    memory_seconds: Annotated[float, typer.Option(min=0, help="For which such a state stops training.")] = 1.0,
    start_seconds: Annotated[float, typer.Option(min=0, help="From starting workers to their first step.")] = 120.0,
    spare_nodes: Annotated[int | None, typer.Option(min=0, help="Default: a lost node is replaced at once.")] = None,
    repair_hours: Annotated[float, typer.Option(min=0, help="Until a lost node is back.")] = 24.0,
    hang_share: Annotated[float, typer.Option(min=0, max=1, help="Failures that hang instead of dying.")] = 0.0,
    preemptions_per_node_day: Annotated[float, typer.Option(min=0, help="Nodes taken away with notice.")] = 0.0,
    min_nodes: Annotated[int | None, typer.Option(min=1, help="Fewest nodes to go on with. Default: all.")] = None,
    slow_node_days: Annotated[float | None, typer.Option(min=0.01, help="Mean days until a node is slow.")] = None,
    seed: Annotated[int, typer.Option(help="Of the failures; the same seed gives the same events.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say what goodput to expect, and what to set, by the launcher's own failure policy on a simulated cluster.

    States in host memory (memory_steps) are those of the recipe's fault_tolerance.memory_checkpoint unless given.
    """
    from launcher.errors import ExpectedError
    from launcher.orchestration import simulator
    from launcher.orchestration.scenario import Scenario

    settings, recipe_steps = _of_recipe(recipe)
    kept = settings.memory_checkpoint
    count = nodes if nodes is not None else _of_profile(profile)
    if count is None:
        raise ExpectedError("how many nodes? Give --nodes, or a --profile")
    best = simulator.best_interval(count, 1 / mtbf_node_days, save_seconds) / step_seconds
    scenario = Scenario(
        nodes=count,
        mtbf_node_days=mtbf_node_days,
        days=days,
        step_seconds=step_seconds,
        save_steps=save_steps or recipe_steps or max(1, round(best)),
        save_seconds=save_seconds,
        memory_steps=memory_steps or (None if kept is None else kept.every_steps),
        memory_seconds=memory_seconds,
        start_seconds=start_seconds,
        spare_nodes=spare_nodes,
        repair_hours=repair_hours,
        hang_share=hang_share,
        preemptions_per_node_day=preemptions_per_node_day,
        slow_node_days=slow_node_days,
        min_nodes=min_nodes,
        seed=seed,
    )
    simulation = simulator.simulate(scenario, settings)
    recommendation = simulator.recommend(scenario, settings)
    if as_json:
        print(json.dumps(_as_json(simulation, recommendation), indent=1))
    else:
        print("\n".join(_lines(simulation, recommendation)))


def _of_recipe(name: str | None) -> Any:
    from launcher.recipe.loading import read_recipe
    from launcher.recipe.run_sections import FaultToleranceSection

    if name is None:
        return FaultToleranceSection(), None
    recipe = read_recipe(name, ()).recipe
    return recipe.fault_tolerance, recipe.checkpoint.save_steps


def _of_profile(name: str | None) -> int | None:
    if name is None:
        return None
    from cluster.profile import load_profile

    return load_profile(name).counts()[0]


def _lines(simulation: "Simulation", recommendation: "Recommendation") -> list[str]:
    scenario, account = simulation.scenario, simulation.account
    between = readable_seconds(simulation.hours_between_failures * 3600) if simulation.failures else "no failure"
    kept = "" if scenario.memory_steps is None else f", a state in memory every {scenario.memory_steps}"
    lines = [
        f"{scenario.nodes} nodes for {scenario.days:g} days, a checkpoint every {scenario.save_steps} steps of "
        f"{scenario.step_seconds:g} s{kept}: goodput {simulation.goodput:.1%}",
        f"{simulation.failures} node failures, mean time between them {between}",
    ]
    rigid, elastic = recommendation.rigid_progress, recommendation.elastic_progress
    if rigid is not None and elastic is not None:
        pays = "pays" if elastic > rigid + 0.005 else "does not pay"
        lines.append(
            f"an elastic size {pays}: with nodes: {{min: {max(1, scenario.nodes // 2)}, max: {scenario.nodes}}} in the "
            f"profile the run makes {elastic:.1%} of the steps of days without trouble, otherwise {rigid:.1%}"
        )
    if simulation.ended == "failed":
        lines.append(f"the run gave up after {account.wall / 86400:.1f} days: {simulation.reason}")
    lines += ["", *(f"  {name:<24}{seconds / account.wall:7.2%}" for name, seconds in account.groups.items()), ""]
    lines.append("goodput by checkpoint.save_steps:")
    for steps, goodput in recommendation.tried.items():
        mark = "  <- recommended" if steps == recommendation.save_steps else ""
        lines.append(f"  {steps:>8}  {goodput:7.2%}{mark}")
    lines.append(
        f"spare nodes: {recommendation.spare_nodes} replace every lost one in 99 % of the time "
        f"(a repair takes {scenario.repair_hours:g} hours)"
    )
    return lines


def _as_json(simulation: "Simulation", recommendation: "Recommendation") -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "scenario": asdict(simulation.scenario),
        "goodput": simulation.goodput,
        "failures": simulation.failures,
        "hours_between_failures": simulation.hours_between_failures if simulation.failures else None,
        "ended": simulation.ended,
        "reason": simulation.reason,
        "seconds": simulation.account.seconds,
        "recommendation": asdict(recommendation),
    }
