"""`zerofleet run` and `zerofleet export`: train in the foreground, and turn a run into a Hugging Face folder."""

import contextlib
import json
import os
import sys
from dataclasses import asdict
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


def export(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write. Default: RUN/export.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: the recipe's.")] = None,
    prune: Annotated[
        float | None, typer.Option(min=0, max=1, help="Set this share of the layers' weights, the smallest, to zero.")
    ] = None,
    max_samples: Annotated[int | None, typer.Option(help="With --prune: measure on so many held-out samples.")] = None,
    ema: Annotated[bool | None, typer.Option(help="The averaged weights, or not. Default: the recipe's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a run's checkpoint as a Hugging Face folder that `from_pretrained` loads."""
    from launcher.checkpoints import folders as checkpoint_folders
    from launcher.errors import CheckpointError, ExpectedError
    from launcher.orchestration.driver import read_plan
    from launcher.planning.methods import with_average

    directory = RunDirectory.at(run_dir)
    plan = read_plan(directory)
    folders = {checkpoint_folders.step_of(path): path for path in checkpoint_folders.complete(directory.checkpoints)}
    if not folders:
        raise CheckpointError(f"{directory.checkpoints} holds no complete checkpoint")
    chosen = max(folders) if step is None else step
    if chosen not in folders:
        raise CheckpointError(
            f"no complete checkpoint of step {step}; there are steps {', '.join(map(str, sorted(folders)))}"
        )
    if dtype is not None:
        if dtype not in ("fp32", "bf16", "fp16"):
            raise ExpectedError(f"--dtype {dtype}: use fp32, bf16 or fp16")
        section = plan.recipe.export.model_copy(update={"dtype": dtype})
        plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"export": section})})
    plan = plan.model_copy(update={"recipe": with_average(plan.recipe, ema)})
    location = _data_location(directory)
    pruned = None
    target = (output or directory.export).absolute()
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed talks on stdout
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if prune is None:
            from launcher.training.export import export_checkpoint

            export_checkpoint(folders[chosen], plan, Path(location["tokenizer_directory"]), target)
        else:
            from launcher.data.store import PreparedData
            from launcher.training.pruning import export_pruned

            prepared = PreparedData.load(Path(location["directory"]))
            pruned = export_pruned(folders[chosen], plan, prepared, target, prune, max_samples)
    if as_json:
        facts = {"step": chosen, "export": str(target)}
        print(json.dumps(facts if pruned is None else {**facts, "pruned": asdict(pruned)}))
        return
    print(f"step {chosen} -> {target}")
    if pruned is not None:
        print(f"{pruned.zeros:,} of {pruned.weights:,} weights of its layers are zero")
        for name, value in pruned.before.items():
            print(f"  {name.replace('_', ' '):<28}{value:.4f} -> {pruned.after[name]:.4f}")


def _data_location(directory: RunDirectory) -> dict[str, Any]:
    location: dict[str, Any] = json.loads(directory.data.read_text())
    return location
