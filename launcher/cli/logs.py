"""`zerofleet logs` and `attach`: what a job writes, and its live line."""

import json
import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli.jobs import JOB
from launcher.orchestration.progress import progress_line

if TYPE_CHECKING:
    from cluster.types import JobRecord

ATTACH_INTERVAL_S = 1.0
STATE_INTERVAL_S = 5.0


def logs(
    job: Annotated[str, typer.Argument(help=JOB)],
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job has ended.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="The log of this rank.")] = None,
    node: Annotated[int, typer.Option(min=0, help="The log of this node; node 0's holds the driver's.")] = 0,
    attempt: Annotated[
        int | None, typer.Option(help="With --rank: one attempt of the run, from 1; -1: the last.")
    ] = None,
    start: Annotated[int | None, typer.Option(min=1, help="One start of a requeued job. Default: the last.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print where the log is and what it holds as JSON.")] = False,
) -> None:
    """Show a job's log: how its nodes came up and what its driver says, or that of a rank."""
    from launcher.errors import ExpectedError
    from launcher.jobs import attempt_of, find_job, log_of
    from launcher.jobs import follow as follow_log

    if attempt is not None and rank is None:
        raise ExpectedError("--attempt goes with --rank; the starts of a requeued job are told apart by --start")
    if follow and (as_json or attempt is not None):
        raise ExpectedError("--follow goes neither with --json nor with --attempt")
    record = find_job(job)
    if follow:
        for content in follow_log(record, lambda: log_of(record, rank=rank, node=node, start=start, may_come=True)):
            _write(content)
        log_of(record, rank=rank, node=node, start=start)  # says it when there was none to the end
        return
    log = log_of(record, rank=rank, node=node, start=start)
    text = log.read(0).decode(errors="replace")
    if attempt is not None:
        text = attempt_of(text, attempt)
    if as_json:
        print(json.dumps({"id": record.id, "log": log.name, "content": text}))
    elif text:
        _write(text.encode())
    else:
        print(f"{log.name} is empty so far; see zerofleet status {record.id}", file=sys.stderr)


def _write(content: bytes) -> None:
    sys.stdout.buffer.write(content)
    sys.stdout.flush()


def attach(
    job: Annotated[str, typer.Argument(help=JOB)],
    as_json: Annotated[bool, typer.Option("--json", help="Print each look as a line of JSON.")] = False,
) -> None:
    """Show the live line of a job until it ends. Ctrl-C leaves the job alone.

    Exit code 0: completed, 130: stopped or cancelled, 1: failed.
    """
    from launcher.jobs import find_job

    raise typer.Exit(watch(find_job(job), as_json=as_json))


def watch(record: "JobRecord", *, as_json: bool = False) -> int:
    """Show a job's live line until it ends; returns the exit code."""
    from launcher.jobs import look

    live, shown = sys.stdout.isatty() and not as_json, ""
    while True:
        view = look([record])[0]
        if as_json:
            print(json.dumps(view.as_json()), flush=True)
        else:
            state = f"{view.status.state}{f' ({view.status.reason})' if view.status.reason else ''}"
            progress = view.progress
            line = state
            if progress.get("max_steps"):
                line = f"{state} | " + progress_line(
                    progress["step"],
                    progress["max_steps"],
                    progress["metrics"],
                    progress["phase"],
                    progress["seconds_remaining"],
                )
            if line != shown:
                sys.stdout.write(f"\r\x1b[2K{line}" if live else f"{line}\n")
                sys.stdout.flush()
                shown = line
        if view.status.state not in ("PENDING", "RUNNING"):
            if live:
                sys.stdout.write("\n")
            return exit_code(view.status.state)
        time.sleep(ATTACH_INTERVAL_S)


def follow_to_the_end(record: "JobRecord") -> int:
    """Show a job's log until it ends; returns the exit code."""
    from launcher.jobs import follow, log_of, look

    for content in follow(record, lambda: log_of(record)):
        _write(content)
    status = look([record])[0].status
    print(f"{record.id}: {status.state}{f' ({status.reason})' if status.reason else ''}")
    return exit_code(status.state)


def exit_code(state: str) -> int:
    """What a command that waited for a job ends with."""
    return {"COMPLETED": 0, "STOPPED": 130, "CANCELLED": 130}.get(state, 1)
