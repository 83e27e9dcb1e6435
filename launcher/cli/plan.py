"""`zerofleet plan`: what a run would do, as text or JSON, without starting anything."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.run_directory import RunDirectory

if TYPE_CHECKING:
    from launcher.planning.layout import Resources
    from launcher.planning.plan import Plan
    from launcher.recipe.loading import RecipeFile


def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, laid over the recipe.")] = None,
    profile: Annotated[str | None, typer.Option(help="Where it would run: a name or a file. Default: local.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Plan for this GPU instead (H100-80GB, ...), or one that FILE.yaml describes.")
    ] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes. Default: the profile's; with --gpu, 1.")] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="With --gpu.")] = 8,
    network: Annotated[str | None, typer.Option(help="Between nodes: NDR-400, EFA-400, ..., or Gbit/s a GPU.")] = None,
    host_memory: Annotated[float | None, typer.Option(min=0, help="Memory of a node in GiB, for offload.")] = None,
    search: Annotated[bool, typer.Option("--search", help="Judge every legal layout and show the best ten.")] = False,
    explain: Annotated[
        str | None, typer.Option(help="Show what a change does, such as tensor_parallel_size=2,zero.stage=3.")
    ] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="Run whose saves were measured, to advise save_steps. Default: runs/NAME.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show what a run would do; starts nothing.

    That is: layout, batch arithmetic, model size, memory of every rank, time of a step, and the exact DeepSpeed config.
    """
    from cluster.profile import load_profile
    from launcher.cli.plan_text import print_plan
    from launcher.errors import ExpectedError
    from launcher.recipe.loading import read_recipe
    from launcher.submit import resources_of

    if search and explain is not None:
        raise ExpectedError("--search and --explain do not go together; leave one of them out")
    loaded = read_recipe(recipe, overrides or ())
    where = load_profile(profile)
    resources = resources_of(where)
    changes: dict[str, Any] = {"network": network or resources.network, "nodes": nodes or resources.nodes}
    if host_memory is not None:
        changes["host_memory"] = int(host_memory * 2**30)
    if gpu is not None:
        changes |= {"device": "cuda", "accelerator": gpu, "workers_per_node": gpus_per_node, "nodes": nodes or 1}
        changes.setdefault("host_memory", None)  # this machine's says nothing of that one's
    resources = resources.model_copy(update=changes)
    if search:
        _search(loaded, recipe, resources, as_json=as_json)
    elif explain is not None:
        _explain(loaded, [recipe, *(overrides or ())], explain, resources, as_json=as_json)
    else:
        planned = _planned(loaded, resources)
        if as_json:
            print(planned.model_dump_json(indent=2))
            return
        print_plan(planned)
        directory = RunDirectory.at(run_dir or Path("runs") / planned.recipe.name)
        advice = save_advice(directory, planned.resources.nodes, where.hours_between_failures)
        if advice is not None:
            print(f"saves: {advice}")


def save_advice(directory: RunDirectory, nodes: int, hours_between_failures: float | None) -> str | None:
    """How often to save, from what saving has cost and how often machines fail; or what is missing to say it.

    None when nothing is known.
    """
    from launcher.planning.save_interval import advise, measured_cost

    cost = measured_cost(directory)
    if cost is None or hours_between_failures is None:
        missing = [] if cost is not None else [f"a run in {directory.path} that has saved"]
        missing += [] if hours_between_failures is not None else ["hours_between_failures in the profile"]
        return None if len(missing) > 1 else f"how often is best follows from {missing[0]}"
    advice = advise(cost, nodes, hours_between_failures)
    machines = "1 node" if nodes == 1 else f"{nodes} nodes"
    return (
        f"save_steps={advice.save_steps} is best (every {advice.seconds:,.0f} s): a save holds training up for "
        f"{cost.blocked_seconds:.3g} s and is committed after {cost.seconds:.3g} s, and {machines} of "
        f"{hours_between_failures:,g} h between failures fail every {hours_between_failures / nodes:,.4g} h. "
        f"A failure then loses {advice.lost_seconds:,.3g} s of work; saves and failures take {advice.overhead:.2%}."
    )


def _planned(loaded: "RecipeFile", resources: "Resources") -> "Plan":
    from launcher.planning.plan import make_plan

    with loaded.locating():
        return make_plan(loaded.recipe, resources)


def _search(loaded: "RecipeFile", name: str, resources: "Resources", *, as_json: bool) -> None:
    from launcher.cli.plan_text import SHOWN, print_search
    from launcher.planning.plan import search_layouts

    with loaded.locating():
        result = search_layouts(loaded.recipe, resources)
    if not as_json:
        print_search(result, name)
        return
    best = [
        {
            "overrides": item.choice.overrides(),
            "seconds": item.step.seconds,
            "tokens_per_second_per_device": item.step.tokens_per_second_per_device,
            "mfu": item.step.mfu,
            "device_bytes": item.rank.device_bytes,
            "host_bytes": item.host_bytes,
        }
        for item in result.best[:SHOWN]
    ]
    print(json.dumps({"choices": result.num_choices, "fitting": len(result.best), "best": best}, indent=1))


def _explain(loaded: "RecipeFile", given: list[str], text: str, resources: "Resources", *, as_json: bool) -> None:
    from launcher.cli.plan_text import print_comparison
    from launcher.cli.submit import split_values
    from launcher.planning.explain import compare
    from launcher.recipe.loading import read_recipe

    recipe, *overrides = given
    changes = split_values(text)
    before = _planned(loaded, resources)
    after = _planned(read_recipe(recipe, [*overrides, *changes]), resources)
    if as_json:
        print(json.dumps([row._asdict() for row in compare(before, after)], indent=1))
    else:
        print_comparison(before, after, changes)
