"""Submitted jobs: which one is meant, how they are, what they wrote, and how they are stopped.

Light to import: looking at a job needs neither pydantic nor anything that trains.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster import registry
from cluster.backends import backend_for
from cluster.start_folder import StartFolder
from cluster.types import FileLog, JobRecord, JobState, JobStatus, Log
from launcher.errors import ExpectedError
from launcher.orchestration.progress import phase_table
from launcher.run_directory import ATTEMPT_MARK, RunDirectory

FOLLOW_INTERVAL_S = 0.5
STATE_INTERVAL_S = 5.0
"""How often a followed job's state is asked: once a log grows, nothing else has to be known."""


@dataclass(frozen=True)
class JobView:
    """A job with all that is known of it at a moment.

    Attributes:
        record: its facts.
        status: its state.
        progress: what its driver last wrote of the run (step, metrics, ...); empty until then.
        phases: seconds that each phase between submission and first step took, as far as it has come.
    """

    record: JobRecord
    status: JobStatus
    progress: dict[str, Any]
    phases: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        record = asdict(self.record)
        status = asdict(self.status)
        facts = {key: record[key] for key in ("id", "name", "backend", "backend_id", "run_directory", "job_directory")}
        more = {key: record[key] for key in ("profile", "nodes", "sweep", "point", "submitted", "argv")}
        status["node_names"] = status.pop("nodes")
        progress = {key: value for key, value in self.progress.items() if key != "moments"}
        return {**facts, **status, **more, "progress": progress, "phases": self.phases}


def find_job(text: str) -> JobRecord:
    """The job that a person means: an id, the beginning of one, the backend's id, a run directory, or one in `runs/`.

    Raises:
        JobLookupError: none, or several.
    """
    for path in (Path(text), Path("runs") / text):
        directory = RunDirectory.at(path)
        if text and directory.jobs.is_dir():
            return registry.find(text, directory.jobs)
    directory = RunDirectory.at(text)
    return registry.find(text, directory.jobs if text and directory.path.is_dir() else None)


def look(records: Sequence[JobRecord]) -> list[JobView]:
    """Look at jobs: one question to each scheduler, and the jobs' own files."""
    statuses: dict[str, JobStatus] = {}
    for backend in {record.backend for record in records}:
        statuses |= backend_for(backend).states([record for record in records if record.backend == backend])
    return [_view(record, statuses[record.id]) for record in records]


def _view(record: JobRecord, status: JobStatus) -> JobView:
    progress = _progress(record)
    moments = {"submitted": record.submitted}
    starts = StartFolder.all_of(Path(record.job_directory))
    if starts:
        moments |= starts[0].phases()
    # A later start's own moments would not fit the first one's.
    if len(starts) <= 1:
        moments = {**progress.get("moments", {}), **moments}
    return JobView(record, status, progress, phase_table(moments))


def _progress(record: JobRecord) -> dict[str, Any]:
    """What the run's driver last wrote, unless that was before this job."""
    try:
        progress: dict[str, Any] = json.loads(RunDirectory.at(record.run_directory).progress.read_bytes())
    except (OSError, ValueError):
        return {}
    return progress if progress.get("time", 0) >= record.submitted else {}


def jobs_of_sweep(sweep: str) -> list[JobRecord]:
    """Records of a sweep, in the order of their submission.

    Raises:
        ExpectedError: there is no such sweep.
    """
    found = [record for record in registry.records() if record.sweep == sweep]
    if not found:
        known = sorted({record.sweep for record in registry.records() if record.sweep})
        raise ExpectedError(f"no sweep {sweep!r}; known are {', '.join(known) or 'none'}")
    return found


def log_of(
    record: JobRecord, *, rank: int | None = None, node: int = 0, start: int | None = None, may_come: bool = False
) -> Log:
    """A log of a job: of the driver and its node (default), of another node, or of a rank.

    Args:
        record: the job.
        rank: whose log.
        node: whose log, without a rank.
        start: which start of a requeued job, without a rank.
        may_come: take a rank's log that is not there yet.

    Raises:
        ExpectedError: there is no such log.
    """
    if rank is None:
        return backend_for(record.backend).log(record, node, start)
    directory = RunDirectory.at(record.run_directory)
    path = directory.rank_log(rank)
    if not path.exists() and not may_come:
        ranks = sorted(int(found.stem.removeprefix("rank_")) for found in directory.logs.glob("rank_*.log"))
        there = f"there are {ranks[0]} to {ranks[-1]}" if ranks else "no worker has started yet"
        raise ExpectedError(f"{directory.logs} has no log of rank {rank}; {there}")
    return FileLog(path)


def attempt_of(content: str, attempt: int) -> str:
    """The part of a rank's log that one attempt wrote.

    Args:
        content: the whole log.
        attempt: from 1; -1 is the last.

    Raises:
        ExpectedError: there was no such attempt.
    """
    parts = ("\n" + content).split(f"\n{ATTEMPT_MARK}")[1:]
    if not parts or not (attempt == -1 or 1 <= attempt <= len(parts)):
        raise ExpectedError(f"there is no attempt {attempt}: the log holds {len(parts)}")
    return ATTEMPT_MARK + parts[attempt - 1 if attempt > 0 else -1] + "\n"


def follow(record: JobRecord, open_log: Callable[[], Log]) -> Iterator[bytes]:
    """Give what a log holds and what is added to it, until the job has ended.

    Args:
        record: the job.
        open_log: gives the log to read; another one when the job has been started again.
    """
    log, offset, asked, ended = open_log(), 0, time.monotonic(), False
    while True:
        content = log.read(offset)
        offset += len(content)
        if content:
            yield content
            continue
        newest = open_log()
        if newest.name != log.name:
            log, offset = newest, 0
        elif ended:
            return
        elif time.monotonic() - asked > STATE_INTERVAL_S:
            asked, ended = time.monotonic(), is_over(record)
        else:
            time.sleep(FOLLOW_INTERVAL_S)


def draft_profile(backend: str) -> str:
    """A profile as YAML, from what this machine tells.

    Raises:
        ExpectedError: no such backend, or its scheduler does not answer.
    """
    from cluster.draft import draft
    from launcher.errors import PlanError
    from launcher.planning.accelerators import find_accelerator

    def accelerator(name: str) -> str | None:
        try:
            return find_accelerator(name).name
        except PlanError:
            return None

    return draft(backend, accelerator)


def is_over(record: JobRecord) -> bool:
    """Whether a job has ended, or nobody can tell any more."""
    return look([record])[0].status.state not in (JobState.PENDING, JobState.RUNNING)


def cancel_job(record: JobRecord, *, now: bool) -> str:
    """Ask a job to save and end, or to end at once; returns what was done.

    Raises:
        ExpectedError: it has ended, or cannot be asked.
    """
    status = look([record])[0].status
    if status.state.is_final:
        raise ExpectedError(f"job {record.id} has ended already: {status.state}")
    return backend_for(record.backend).cancel(record, now=now)
