"""`zerofleet checkpoint`: look at a run's checkpoints, keep or delete them, ask for one, convert one."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.errors import CheckpointError, RunDirectoryError
from launcher.orchestration.progress import readable_bytes
from launcher.run_directory import RunDirectory

checkpoint = typer.Typer(no_args_is_help=True, help="Look at, verify, keep, delete, request or convert checkpoints.")

DAMAGED = 2
"""Exit code of `verify` when something is damaged."""

Run = Annotated[str, typer.Argument(help="Run directory, or name of a run below runs/.", metavar="RUN")]
Step = Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@checkpoint.command("ls")
def list_checkpoints(run: Run, as_json: AsJson = False) -> None:
    """List a run's checkpoints, oldest first; sizes are compared, contents are not read."""
    rows = [_summary(folder) for folder in _present(_directory(run))]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    print(f"{'step':>10}  {'saved':<19}  {'size':>10}  {'ZeRO':>4}  {'workers':>7}  {'eval loss':>9}  notes")
    for row in rows:
        if row["faults"]:
            print(f"{row['step']:>10}  damaged: {'; '.join(row['faults'])}")
            continue
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["saved_at"]))
        loss = "" if row["eval_loss"] is None else f"{row['eval_loss']:.4f}"
        notes = [row["reason"], *(name for name in ("pinned", "converted") if row[name])]
        print(
            f"{row['step']:>10}  {saved}  {readable_bytes(row['size']):>10}  {row['zero_stage']:>4}  "
            f"{row['world_size']:>7}  {loss:>9}  {', '.join(notes)}"
        )


@checkpoint.command()
def verify(run: Run, step: Step = None, as_json: AsJson = False) -> None:
    """Read every byte of the checkpoints and compare it with its checksum; exit code 2 when something is damaged."""
    from launcher.checkpoints import folders
    from launcher.checkpoints.manifest import faults_of

    directory = _directory(run)
    chosen = _present(directory) if step is None else [_chosen(directory, step)]
    chosen += [folder for folder in map(folders.universal_of, chosen) if folder.is_dir()]
    results = []
    for folder in chosen:
        began = time.perf_counter()
        faults = faults_of(folder, contents=True)
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        results.append({"checkpoint": folder.name, "faults": faults, "size": size, "seconds": round(seconds, 3)})
        if not as_json:
            verdict = "damaged" if faults else "sound"
            print(f"{folder.name}: {verdict}, {readable_bytes(size)} read in {seconds:.1f} s")
            for fault in faults:
                print(f"  {fault}")
    if as_json:
        print(json.dumps(results, indent=2))
    if any(result["faults"] for result in results):
        raise typer.Exit(DAMAGED)


@checkpoint.command()
def inspect(run: Run, step: Step = None, as_json: AsJson = False) -> None:
    """Show what a checkpoint says of itself."""
    from launcher.checkpoints.manifest import read_manifest

    folder = _chosen(_directory(run), step)
    manifest = read_manifest(folder)
    if as_json:
        print(manifest.model_dump_json(indent=2))
        return
    layout, batch = manifest.layout, manifest.batch
    facts = {
        "step": f"{manifest.step}, {manifest.consumed_samples:,} samples into the data",
        "saved": f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(manifest.saved_at))}, reason: {manifest.reason}",
        "layout": f"{layout.world_size} workers, data-parallel {layout.data_parallel_size}, "
        f"tensor-parallel {layout.tensor_parallel_size}, pipeline-parallel {layout.pipeline_parallel_size}",
        "ZeRO": f"stage {manifest.zero_stage}, {manifest.precision}",
        "global batch": f"{batch.global_batch_size} samples",
        "eval loss": "not measured at this step" if manifest.eval_loss is None else f"{manifest.eval_loss:.6f}",
        "data": manifest.data_fingerprint,
        "recipe": manifest.recipe_hash,
        "written by": ", ".join(f"{name} {version}" for name, version in manifest.versions.items()),
    }
    print(folder)
    for label, text in facts.items():
        print(f"  {label:<14}{text}")
    print(f"  {'files':<14}{len(manifest.files)}, {readable_bytes(manifest.size)}")
    for name, record in manifest.files.items():
        print(f"    {readable_bytes(record.size):>10}  {record.xxh3_128}  {name}")


@checkpoint.command()
def pin(run: Run, step: Step = None, as_json: AsJson = False) -> None:
    """Keep a checkpoint, whatever the recipe's limits say."""
    from launcher.checkpoints import retention

    folder = _chosen(_directory(run), step)
    retention.pin(folder)
    _say({"pinned": folder.name}, f"{folder.name} is kept until you unpin it", as_json)


@checkpoint.command()
def unpin(run: Run, step: Step = None, as_json: AsJson = False) -> None:
    """Let the recipe's limits apply to a checkpoint again."""
    from launcher.checkpoints import retention

    folder = _chosen(_directory(run), step)
    retention.unpin(folder)
    _say({"unpinned": folder.name}, f"{folder.name} is no longer pinned", as_json)


@checkpoint.command()
def prune(run: Run, as_json: AsJson = False) -> None:
    """Delete what the recipe's limits do not keep; also while the run is at work."""
    from launcher.checkpoints import retention
    from launcher.orchestration.driver import read_plan

    directory = _directory(run)
    deleted = retention.prune(directory.checkpoints, read_plan(directory).recipe.checkpoint)
    _say({"deleted": deleted}, f"deleted: {', '.join(deleted) or 'nothing'}", as_json)


@checkpoint.command()
def save(
    run: Run,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the answer.")] = 600.0,
    as_json: AsJson = False,
) -> None:
    """Ask a run that is at work for a checkpoint now, and wait until it is committed."""
    from launcher.checkpoints import requests
    from launcher.orchestration.run_lock import is_held

    directory = _directory(run)
    if not is_held(directory):
        raise RunDirectoryError(f"no run is at work in {directory.path}: there is nothing to save")
    answer = requests.ask_and_wait(directory, timeout)
    if not answer.saved:
        raise CheckpointError(f"the checkpoint at step {answer.step} could not be written; the run's log says why")
    _say({"step": answer.step}, f"saved at step {answer.step}", as_json)


@checkpoint.command()
def convert(
    run: Run,
    step: Step = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. Default: the number of cores.")] = None,
    as_json: AsJson = False,
) -> None:
    """Convert a checkpoint to the form that every layout can load, as a resume in another layout does by itself."""
    from launcher.orchestration.run_lock import holding

    directory = _directory(run)
    folder = _chosen(directory, step)
    with holding(directory):
        from launcher.training.convert import convert_locally

        result = convert_locally(folder, workers)
    _say(
        {"universal": str(result.folder), "size": result.size, "seconds": round(result.seconds, 3)},
        f"{folder.name} -> {result.folder.name}, {readable_bytes(result.size)} in {result.seconds:.1f} s",
        as_json,
    )


def _directory(run: str) -> RunDirectory:
    for path in (Path(run), Path("runs") / run):
        directory = RunDirectory.at(path)
        if directory.plan.is_file():
            return directory
    raise RunDirectoryError(f"{run} is no run directory: neither {run}/plan.json nor runs/{run}/plan.json exists")


def _present(directory: RunDirectory) -> list[Path]:
    from launcher.checkpoints import folders

    return folders.complete(directory.checkpoints)


def _chosen(directory: RunDirectory, step: int | None) -> Path:
    from launcher.checkpoints import folders

    present = {folders.step_of(folder): folder for folder in _present(directory)}
    if not present:
        raise CheckpointError(f"{directory.checkpoints} holds no complete checkpoint")
    wanted = max(present) if step is None else step
    if wanted not in present:
        raise CheckpointError(
            f"no complete checkpoint of step {step}; there are steps {', '.join(map(str, sorted(present)))}"
        )
    return present[wanted]


def _summary(folder: Path) -> dict[str, Any]:
    from launcher.checkpoints import folders, retention
    from launcher.checkpoints.manifest import faults_of, read_manifest

    row: dict[str, Any] = {"step": folders.step_of(folder), "checkpoint": str(folder)}
    row |= {"faults": faults_of(folder, contents=False)}
    if row["faults"]:
        return row
    manifest = read_manifest(folder)
    return row | {
        "saved_at": manifest.saved_at,
        "reason": manifest.reason,
        "size": manifest.size,
        "zero_stage": manifest.zero_stage,
        "world_size": manifest.layout.world_size,
        "consumed_samples": manifest.consumed_samples,
        "eval_loss": manifest.eval_loss,
        "pinned": retention.is_pinned(folder),
        "converted": folders.universal_of(folder).is_dir(),
    }


def _say(facts: dict[str, Any], text: str, as_json: bool) -> None:
    sys.stdout.write((json.dumps(facts) if as_json else text) + "\n")
