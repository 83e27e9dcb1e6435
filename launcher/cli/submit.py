"""`zerofleet submit` and `zerofleet sweep`: send runs to where they go on without this terminal."""

import itertools
import json
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.profile import Profile
    from cluster.types import JobRecord
    from launcher.planning.plan import Plan
    from launcher.run_directory import RunDirectory

MAX_SWEEP = 200


def submit(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, laid over the recipe.")] = None,
    profile: Annotated[str | None, typer.Option(help="Where to run: a name or a file. Default: local.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print exactly what would be sent; send nothing.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show the job's log until it ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the job as JSON.")] = False,
) -> None:
    """Send a run to the profile's backend; it goes on when this terminal is closed.

    Watch it with `zerofleet status`, `logs` and `attach`; `cancel` has it save and end; submitting again continues.
    """
    from launcher.submit import render_job, submit_job

    plan, where = _planned(recipe, overrides or [], profile)
    directory = _run_directory(run_dir, where, plan.recipe.name)
    if dry_run:
        print(render_job(plan, where, directory), end="")
        return
    record = submit_job(plan, where, directory)
    _tell([record], as_json=as_json)
    if follow:
        from launcher.cli.logs import follow_to_the_end

        raise typer.Exit(follow_to_the_end(record))


def sweep(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    grid: Annotated[list[str], typer.Argument(help="key=V1,V2,... for what varies, key=V for what does not.")],
    profile: Annotated[str | None, typer.Option(help="Where to run: a name or a file. Default: local.")] = None,
    runs_dir: Annotated[Path | None, typer.Option(help="Folder for the runs. Default: runs/NAME-ID.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be submitted; send nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the jobs as JSON.")] = False,
) -> None:
    """Submit a recipe once for every combination of values: `learning_rate=1e-4,3e-4 seed=1,2` makes four runs.

    All of them are planned before the first is sent. `zerofleet jobs --sweep ID` compares them.
    """
    from launcher.errors import ExpectedError
    from launcher.submit import render_job, submit_job

    points = combinations(grid)
    if len(points) > MAX_SWEEP:
        raise ExpectedError(f"the grid has {len(points)} points, and {MAX_SWEEP} is the most; vary less at a time")
    planned = [_planned(recipe, point, profile) for point in points]
    sweep_id = secrets.token_hex(3)
    plan, where = planned[0]
    folder = _run_directory(runs_dir, where, f"{plan.recipe.name}-{sweep_id}").path
    records = []
    for index, (point, (plan, where)) in enumerate(zip(points, planned, strict=True)):
        from launcher.run_directory import RunDirectory

        directory = RunDirectory.at(folder / f"{index:03d}")
        if dry_run:
            print(f"# {directory.path}: {' '.join(point)}\n{render_job(plan, where, directory)}")
        else:
            records.append(submit_job(plan, where, directory, sweep=sweep_id, point=point))
    if records:
        _tell(records, as_json=as_json)
        if not as_json:
            print(f"sweep {sweep_id}: compare its {len(records)} runs with zerofleet jobs --sweep {sweep_id}")


def combinations(grid: list[str]) -> list[list[str]]:
    """The overrides of every point of a grid, the last key varying fastest."""
    axes = []
    for text in grid:
        key, equals, values = text.partition("=")
        axes.append([f"{key}{equals}{value}" for value in split_values(values)])
    return [list(point) for point in itertools.product(*axes)]


def split_values(text: str) -> list[str]:
    """Split at the commas that stand outside of brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _planned(recipe: str, overrides: list[str], profile: str | None) -> "tuple[Plan, Profile]":
    from cluster.profile import load_profile, profile_warnings
    from launcher.planning.plan import make_plan
    from launcher.recipe.loading import read_recipe
    from launcher.submit import resources_of

    loaded = read_recipe(recipe, overrides)
    where = load_profile(profile)
    for warning in profile_warnings(profile):
        print(f"warning: {warning}", file=sys.stderr)
    with loaded.locating():
        return make_plan(loaded.recipe, resources_of(where)), where


def _run_directory(given: Path | None, profile: "Profile", name: str) -> "RunDirectory":
    from launcher.run_directory import RunDirectory

    return RunDirectory.at(given or Path(profile.runs_directory or "runs").expanduser() / name)


def _tell(records: "list[JobRecord]", *, as_json: bool) -> None:
    if as_json:
        from dataclasses import asdict

        print(json.dumps([asdict(record) for record in records] if len(records) > 1 else asdict(records[0]), indent=1))
        return
    for record in records:
        print(
            f"{record.id}  {record.name}: submitted to {record.backend} as {record.backend_id}, {record.run_directory}"
        )
