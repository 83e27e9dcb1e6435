"""`zerofleet jobs`, `status` and `cancel`: how submitted jobs are, and how they are stopped."""

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.orchestration.progress import progress_line, readable_seconds, render_phases

if TYPE_CHECKING:
    from launcher.jobs import JobView

NEWEST = 20
JOB = "Job id, the beginning of one, or a run directory."


def jobs(
    sweep: Annotated[str | None, typer.Option(help="Only those of this sweep, with their last losses.")] = None,
    everything: Annotated[bool, typer.Option("--all", help=f"All, not the {NEWEST} newest.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List submitted jobs, the newest first."""
    from cluster.registry import records
    from launcher.jobs import jobs_of_sweep, look

    chosen = jobs_of_sweep(sweep) if sweep is not None else records()[::-1]
    views = look(chosen if everything or sweep is not None else chosen[:NEWEST])
    if as_json:
        print(json.dumps([view.as_json() for view in views], indent=1))
        return
    if not views:
        print("no job was submitted yet: zerofleet submit RECIPE --profile PROFILE")
    header = ["JOB", "NAME", "STATE", "WHERE", "STEP", "LOSS", "AGE", "RUN DIRECTORY"]
    rows = [header, *map(_row, views)]
    if sweep is not None:
        points = [["VALUES"], *([what_varies(view, views)] for view in views)]
        rows = [[*row[:6], *point, *row[6:]] for row, point in zip(rows, points, strict=True)]
    for row in _table(rows):
        print(row)
    if len(chosen) > len(views):
        print(f"{len(chosen) - len(views)} older ones are not shown: zerofleet jobs --all")


def what_varies(view: "JobView", views: "list[JobView]") -> str:
    """Of a point of a sweep, what not all of its points have."""
    shared = set(view.record.point).intersection(*(other.record.point for other in views)) if len(views) > 1 else set()
    return " ".join(part for part in view.record.point if part not in shared) or "-"


def _row(view: "JobView") -> list[str]:
    record, progress = view.record, view.progress
    metrics = progress.get("metrics", {})
    step = f"{progress['step']}/{progress['max_steps']}" if progress.get("max_steps") else "-"
    loss = metrics.get("eval_loss") or metrics.get("loss")
    now = view.status
    state = f"{now.state} ({now.reason})" if now.state == "PENDING" and now.reason else now.state.value
    where = f"{record.backend} {record.backend_id}" if record.backend in ("slurm", "ray") else record.backend
    age, directory = readable_seconds(time.time() - record.submitted), _on_a_line(record.run_directory)
    return [record.id, record.name, state, where, step, f"{loss:.4f}" if loss else "-", age, directory]


def _on_a_line(path: str) -> str:
    """A path as it is, unless it holds what would break the line."""
    return path if path.isprintable() else repr(path)


def _table(rows: list[list[str]]) -> list[str]:
    if len(rows) == 1:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def status(
    job: Annotated[str, typer.Argument(help=JOB)],
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show how a job is: its state and why, how far it is, and how long each phase of its start took."""
    from launcher.jobs import find_job, look

    view = look([find_job(job)])[0]
    if as_json:
        print(json.dumps(view.as_json(), indent=1))
        return
    typer.secho(f"{view.record.id}  {view.record.name}  {view.status.state}", bold=True)
    for label, text in _facts(view):
        print(f"  {label:<16}{text}")
    for line in beside_plan(view):
        print(f"  {line}")
    if view.phases:
        print("  the start took")
        print(render_phases(view.phases))


def _facts(view: "JobView") -> list[tuple[str, str]]:
    record, now = view.record, view.status
    facts = [(record.backend, f"{record.backend_id}{f', {now.native}' if now.native else ''}")]
    if now.reason:
        facts.append(("because", now.reason))
    if now.expected_start is not None:
        facts.append(("expected start", time.strftime("%Y-%m-%d %H:%M", time.localtime(now.expected_start))))
    if view.progress:
        facts.append(("progress", _line(view.progress)))
    goodput = _goodput(record.run_directory)
    if goodput is not None:
        facts.append(("goodput", f"{goodput:.1%} of the time since its start was progress that is kept"))
    facts.append(("nodes", ", ".join(now.nodes) or f"{record.nodes} asked for"))
    if now.starts > 1:
        facts.append(("starts", f"{now.starts}: it was requeued"))
    facts.append(("submitted", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.submitted))))
    facts.append(("run directory", _on_a_line(record.run_directory)))
    return facts


def _goodput(run_directory: str) -> float | None:
    from launcher.orchestration.journal import read_account
    from launcher.run_directory import RunDirectory

    return read_account(RunDirectory.at(run_directory)).goodput


def beside_plan(view: "JobView") -> list[str]:
    """The plan beside what was measured; nothing where the plan cannot be read here."""
    from launcher.cli.plan_text import beside_lines
    from launcher.errors import ExpectedError
    from launcher.orchestration.driver import read_plan
    from launcher.run_directory import RunDirectory

    metrics = view.progress.get("metrics")
    if not metrics:
        return []
    try:
        return beside_lines(read_plan(RunDirectory.at(view.record.run_directory)), metrics)
    except (ExpectedError, OSError):
        return []


def _line(progress: dict[str, Any]) -> str:
    return progress_line(
        progress["step"], progress["max_steps"], progress["metrics"], progress["phase"], progress["seconds_remaining"]
    )


def cancel(
    job: Annotated[str, typer.Argument(help=JOB)],
    now: Annotated[bool, typer.Option("--now", help="End it at once, without saving.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it has ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")] = False,
) -> None:
    """Have a job save and end; submitting its recipe again to the same run directory continues it."""
    from launcher.jobs import FOLLOW_INTERVAL_S, cancel_job, find_job, is_over, look

    record = find_job(job)
    done = cancel_job(record, now=now)
    while wait and not is_over(record):
        time.sleep(FOLLOW_INTERVAL_S)
    if as_json:
        print(json.dumps({"id": record.id, "done": done, "state": look([record])[0].status.state}))
    else:
        print(f"{record.id}: {done}")
