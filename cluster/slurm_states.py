"""What Slurm knows of jobs: one question to squeue for all of them, sacct for those it has forgotten."""

import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from cluster.errors import BackendError
from cluster.types import JobState

TIMEOUT_S = 30

STATES: Mapping[str, JobState] = {
    "PENDING": JobState.PENDING,
    "CONFIGURING": JobState.PENDING,
    "REQUEUED": JobState.PENDING,
    "REQUEUE_FED": JobState.PENDING,
    "REQUEUE_HOLD": JobState.PENDING,
    "SPECIAL_EXIT": JobState.PENDING,
    "RESV_DEL_HOLD": JobState.PENDING,
    "SUSPENDED": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "COMPLETING": JobState.RUNNING,
    "RESIZING": JobState.RUNNING,
    "SIGNALING": JobState.RUNNING,
    "STAGE_OUT": JobState.RUNNING,
    "STOPPED": JobState.RUNNING,
    "COMPLETED": JobState.COMPLETED,
    "CANCELLED": JobState.CANCELLED,
    "PREEMPTED": JobState.CANCELLED,
    "REVOKED": JobState.CANCELLED,
    "FAILED": JobState.FAILED,
    "TIMEOUT": JobState.FAILED,
    "NODE_FAIL": JobState.FAILED,
    "BOOT_FAIL": JobState.FAILED,
    "DEADLINE": JobState.FAILED,
    "OUT_OF_MEMORY": JobState.FAILED,
}
"""Slurm's states (squeue(1), JOB STATE CODES) as ours."""

EXPLANATIONS: Mapping[str, str] = {
    "TIMEOUT": "it reached its time limit before it had saved and ended; fault_tolerance.save_before_end_seconds is "
    "the time it has for that",
    "NODE_FAIL": "one of its nodes failed",
    "OUT_OF_MEMORY": "it used more memory than its nodes gave it; see slurm.memory_per_node",
    "BOOT_FAIL": "its nodes did not boot",
    "DEADLINE": "its deadline passed",
    "PREEMPTED": "another job took its nodes",
}


@dataclass(frozen=True)
class SlurmJob:
    """What Slurm says of a job.

    Attributes:
        state: in Slurm's words.
        reason: why it waits, in Slurm's words; empty for none.
        nodes: its nodes in Slurm's short form, `n[1-4]`; empty for none.
        expected_start: Unix time at which it should start, if Slurm has planned that.
    """

    state: str
    reason: str = ""
    nodes: str = ""
    expected_start: float | None = None

    @property
    def ours(self) -> JobState:
        """The state as one of ours."""
        return STATES.get(self.state, JobState.UNKNOWN)


def ask_squeue() -> dict[str, SlurmJob]:
    """All jobs of this user that Slurm remembers, ended ones too, by their id (an array's tasks by the array's).

    Raises:
        BackendError: Slurm does not answer; the text holds its words.
    """
    lines = run_slurm("squeue", "--me", "--noheader", "--states=all", "--array", "--format=%F|%T|%r|%N|%S").splitlines()
    jobs: dict[str, SlurmJob] = {}
    for parts in (line.split("|") for line in lines):
        if len(parts) != 5:  # a site's greeting
            continue
        job_id, state, reason, nodes, start = (part.strip() for part in parts)
        pending = STATES.get(state) is JobState.PENDING
        planned = _time(start) if pending else None
        job = SlurmJob(state, reason if reason not in ("None", "(null)") else "", nodes, planned)
        jobs[job_id] = _of_array(jobs.get(job_id), job)
    return jobs


def _of_array(known: SlurmJob | None, other: SlurmJob) -> SlurmJob:
    """Of an array's tasks, which run one after the other: the one that runs, else that waits, else that ended last."""
    order = [JobState.RUNNING, JobState.PENDING]
    if known is None or known.ours not in order:
        return other
    return min(known, other, key=lambda job: order.index(job.ours) if job.ours in order else len(order))


def ask_sacct(job_ids: Iterable[str]) -> dict[str, SlurmJob]:
    """Jobs that squeue has forgotten; nothing where accounting is not set up."""
    try:
        options = ("--noheader", "--parsable2", "--allocations", "--format=JobIDRaw,State")
        lines = run_slurm("sacct", *options, f"--jobs={','.join(job_ids)}").splitlines()
    except BackendError:
        return {}
    pairs = (line.split("|") for line in lines if line.count("|") == 1)
    return {job_id: SlurmJob(state.split()[0]) for job_id, state in pairs if state}  # "CANCELLED by 1000"


def run_slurm(*command: str) -> str:
    """Run one of Slurm's commands and return its output.

    Raises:
        BackendError: it is not installed, does not answer, or refuses; the text holds its words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except FileNotFoundError as error:
        raise BackendError(f"{command[0]} is not installed here: is this a machine of the Slurm cluster?") from error
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"{command[0]} does not answer within {TIMEOUT_S} s") from error
    if done.returncode:
        raise BackendError(f"{command[0]} failed: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def _time(text: str) -> float | None:
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
