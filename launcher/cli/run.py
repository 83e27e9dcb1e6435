"""`zerofleet run`: train in the foreground."""

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli.live import LiveObserver, print_summary
from launcher.run_directory import RunDirectory

if TYPE_CHECKING:
    from cluster.profile import Profile
    from launcher.planning.plan import Plan

INTERRUPTED = 130


def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a shipped one.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value, laid over the recipe.")] = None,
    profile: Annotated[str | None, typer.Option(help="Where to run: a name or a file. Default: local.")] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run directory. Default: runs/NAME.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train a recipe in the foreground; continues from the newest checkpoint in the run directory.

    Ctrl-C saves and stops; a second one stops at once. Exit code 0: complete, 2: something to mend, 130: stopped.
    """
    from cluster.profile import load_profile
    from launcher.planning.plan import make_plan
    from launcher.recipe.loading import read_recipe
    from launcher.submit import resources_of

    loaded = read_recipe(recipe, overrides or ())
    directory = RunDirectory.at(run_dir or Path("runs") / loaded.recipe.name)
    with loaded.locating():
        where = load_profile(profile)
        plan = make_plan(loaded.recipe, resources_of(where))
        summary = _watched(LiveObserver(plan, directory, quiet=as_json), plan, where, directory)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        print_summary(summary, plan, directory)
    if summary["status"] != "complete":
        raise typer.Exit(INTERRUPTED)


def _watched(observer: LiveObserver, plan: "Plan", profile: "Profile", directory: RunDirectory) -> dict[str, Any]:
    from launcher.submit import run_foreground

    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray says there what it thinks of a dead worker
            return run_foreground(plan, profile, directory, observer)
    except KeyboardInterrupt:
        observer.close()
        print(
            "interrupted: the workers were ended at once; the next run continues from the last checkpoint",
            file=sys.stderr,
        )
        raise typer.Exit(INTERRUPTED) from None
    finally:
        observer.close()
