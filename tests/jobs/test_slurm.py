"""What a real Slurm does to a job: requeues it, takes its time, loses its nodes, refuses it."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import BackendError
from cluster.profile import Profile
from cluster.slurm import SlurmBackend
from cluster.types import JobRecord, JobRequest, JobState, JobStatus
from launcher.run_directory import RunDirectory, read_json_lines
from tests.jobs.conftest import (
    LONG,
    Zerofleet,
    assert_nothing_left,
    losses,
    processes_of,
    wait_for,
    wait_for_step,
    write_profile,
)
from tests.support.slurm_cluster import SlurmCluster

pytestmark = pytest.mark.slurm

BACKEND = SlurmBackend()

DRIVER = """
import os, pathlib, signal, sys, time
import ray
folder = pathlib.Path(sys.argv[1])
def save(*_):
    (folder / "saved").touch()
    os._exit(130)
ray.init(log_to_driver=False, logging_level="ERROR")
signal.signal(signal.SIGTERM, save)
(folder / "nodes").write_text(str(sum(node["Alive"] for node in ray.nodes())))
while not (folder / "go").exists():
    time.sleep(0.1)
print("answer", ray.get(ray.remote(lambda: 42).remote()), flush=True)
"""


class Job:
    """A job whose driver says how many Ray nodes it sees and waits to be told to go on."""

    def __init__(self, folder: Path, nodes: int, **slurm) -> None:
        folder.mkdir()
        self.folder = folder
        profile = Profile(
            backend="slurm", nodes=nodes, workers_per_node=1, device="cpu", slurm={"time_limit": "30", **slurm}
        )
        self.request = JobRequest(
            name=folder.name,
            run_directory=folder,
            job_directory=folder / "jobs" / "0001",
            argv=(sys.executable, "-P", "-c", DRIVER, str(folder)),
            profile=profile,
            nodes=nodes,
            cpus_per_node=1.0,
            gpus_per_node=0,
            save_before_end_seconds=60,
            progress_directory=folder / "checkpoints",
        )
        self.submitted = BACKEND.submit(self.request)
        self.record = JobRecord(
            id="bakemotu",
            name=folder.name,
            backend="slurm",
            backend_id=self.submitted.backend_id,
            run_directory=str(folder),
            job_directory=str(self.request.job_directory),
            argv=self.request.argv,
            submitted=0.0,
            profile="lab",
            nodes=nodes,
        )

    def status(self) -> JobStatus:
        return BACKEND.states([self.record])[self.record.id]

    def wait_for(self, *states: JobState, timeout: float = 60) -> JobStatus:
        def reached() -> JobStatus | None:
            status = self.status()
            return status if status.state in states else None

        found: JobStatus = wait_for(reached, f"{states} of {self.folder.name}; it is {self.status()}", timeout)
        return found

    def wait_for_driver(self) -> int:
        """How many nodes its driver sees."""
        return int(wait_for((self.folder / "nodes").exists, "driver", 60) and (self.folder / "nodes").read_text())

    def log(self) -> str:
        return BACKEND.log(self.record, 0, None).read(0).decode()


@pytest.fixture
def submit(slurm_here: SlurmCluster, tmp_path: Path):
    jobs: list[Job] = []

    def make(name: str, nodes: int = 1, **slurm) -> Job:
        jobs.append(Job(tmp_path / name, nodes, **slurm))
        return jobs[-1]

    yield make
    for job in jobs:
        slurm_here.command("scancel", job.record.backend_id)
        job.wait_for(*(state for state in JobState if state.is_final))


def test_two_jobs_on_one_node_leave_each_others_ray_alone(submit: Callable[..., Job]):
    first, second = submit("first", nodelist="n1"), submit("second", nodelist="n1")
    assert [job.wait_for_driver() for job in (first, second)] == [1, 1], "each sees its own Ray only"
    assert first.status().state is second.status().state is JobState.RUNNING
    BACKEND.cancel(first.record, now=False)
    assert first.wait_for(JobState.STOPPED).reason == "SIGTERM: saved and ended"
    assert (first.folder / "saved").exists()
    assert_nothing_left(first.folder)
    assert processes_of(second.folder)
    (second.folder / "go").touch()
    second.wait_for(JobState.COMPLETED)
    assert "answer 42" in second.log(), "its Ray still worked"
    assert_nothing_left(second.folder)


def test_a_killed_slurmd_and_a_scancel_from_outside(submit: Callable[..., Job], slurm_here: SlurmCluster):
    job = submit("job", nodes=2)
    assert job.wait_for_driver() == 2
    slurm_here.stop("n2", signal.SIGKILL)
    try:
        status = job.wait_for(JobState.PENDING)
        assert status.native == "PENDING"
        waiting = wait_for(lambda: job.status().reason not in ("", "BeginTime") and job.status(), "a reason", 30)
        assert (waiting.state, waiting.starts) == (JobState.PENDING, 1)
        (job.folder / "nodes").unlink()
    finally:
        slurm_here.start_node("n2")
    assert job.wait_for_driver() == 2
    assert (job.status().state, job.status().starts) == (JobState.RUNNING, 2)
    slurm_here.command("scancel", job.record.backend_id)
    status = job.wait_for(JobState.CANCELLED)
    assert (status.native, status.reason) == ("CANCELLED", "SIGTERM: saved and ended")
    assert_nothing_left(job.folder)


def test_a_requeue_by_an_administrator_and_a_time_limit_change_no_loss(
    zerofleet: Zerofleet, slurm: SlurmCluster, uninterrupted: Path, workplace: Path
):
    run_directory = workplace / "requeued"
    profile = write_profile(workplace / "requeued.yaml", backend="slurm", slurm={"time_limit": "30"})
    job = zerofleet.submit(profile, run_directory, f"max_steps={LONG}", "save_steps=20")
    slurm_id = zerofleet.status(job)["backend_id"]

    wait_for_step(run_directory, 25)
    slurm.command("scontrol", "requeue", slurm_id)
    zerofleet.wait_for_state(job, "PENDING")
    reached = max(losses(run_directory))
    wait_for_step(run_directory, reached + 5)

    # Two minutes at most, of which 100 s are to be left for saving: Slurm warns at its next look.
    slurm.command("scontrol", "update", f"JobId={slurm_id}", "TimeLimit=2")
    zerofleet.wait_for_state(job, "PENDING")
    slurm.command("scontrol", "update", f"JobId={slurm_id}", "TimeLimit=30")
    status = zerofleet.wait_for_state(job, "COMPLETED")
    assert status["starts"] == 3
    second = zerofleet.ok("logs", job, "--start", "2")
    assert "SIGUSR2: the driver saves and ends" in second
    assert "SIGUSR2: saved and ended, to be requeued" in second
    saved = [
        event["step"] for event in read_json_lines(RunDirectory.at(run_directory).events) if event["state"] == "stopped"
    ]
    assert saved, "the time limit made it save where it was"
    assert saved[-1] % 20, "and not at one of the steps at which it saves anyway"

    wait_for_step(uninterrupted, LONG)
    assert losses(run_directory) == losses(uninterrupted)
    assert_nothing_left(run_directory)


def test_what_slurm_refuses_is_passed_on_with_what_was_sent(submit: Callable[..., Job], tmp_path: Path, capfd):
    with pytest.raises(BackendError, match=r"(?s)invalid partition specified: nowhere.*#SBATCH --partition=nowhere"):
        submit("partition", partition="nowhere")
    with pytest.raises(BackendError, match=r"(?s)Invalid --mem specification.*#SBATCH --mem=lots"):
        submit("memory", memory_per_node="lots")
    with pytest.raises(BackendError, match=r"(?s)Invalid feature specification.*#SBATCH --constraint=a100"):
        submit("feature", constraint="a100")
    assert capfd.readouterr().err == "", "nothing is said twice"
    assert not list(tmp_path.glob("*/jobs/0001")), "nothing is left of what was refused"


def test_what_slurm_takes_and_can_never_start_says_why_it_waits(submit: Callable[..., Job]):
    jobs = {
        "PartitionNodeLimit": submit("more-nodes-than-there-are", nodes=5),
        "account not known, so it can't use this partition": submit("account", partition="closed", account="strangers"),
    }
    for reason, job in jobs.items():
        wait_for(lambda job=job, reason=reason: reason in job.status().reason, reason, 20)
        assert job.status().state is JobState.PENDING
        assert BACKEND.cancel(job.record, now=False)
        job.wait_for(JobState.CANCELLED)


def test_without_munge_nothing_hangs_and_the_reason_is_said(submit: Callable[..., Job], slurm_here: SlurmCluster):
    job = submit("waiting", nodelist="n1", options={"hold": True})
    assert job.wait_for(JobState.PENDING).reason == "JobHeldUser"
    slurm_here.stop("munged")
    try:
        with pytest.raises(BackendError, match=r"(?s)sbatch refused the job: .*(munge|Protocol authentication error)"):
            submit("refused")
        status = job.status()
        assert status.state is JobState.UNKNOWN
        assert re.search(r"munge|Protocol authentication error", status.reason)
    finally:
        slurm_here.start_munge()
    wait_for(lambda: job.status().state is JobState.PENDING, "answer of Slurm")


def test_a_profile_from_what_slurm_tells(zerofleet: Zerofleet, slurm: SlurmCluster, tmp_path: Path):
    output = tmp_path / "profiles" / "lab.yaml"
    zerofleet.ok("profile", "init", "slurm", "--output", str(output))
    text = output.read_text()
    assert 'partition: "debug"' in text
    assert "# also there: high (2 nodes, 4 CPUs, 0 GPUs, infinite)" in text
    shown = zerofleet.ok(
        "submit", str(zerofleet.recipe), "--profile", str(output), "--run-dir", str(tmp_path / "run"), "--dry-run"
    )
    checked = subprocess.run(
        ["sbatch", "--test-only"],
        input=shown,
        env={**zerofleet.environment, "PATH": "/usr/bin:/bin"},
        text=True,
        check=False,
        capture_output=True,
    )
    assert checked.returncode == 0, checked.stderr
