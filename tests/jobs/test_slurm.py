"""What a real Slurm does to a job: requeues it, takes its time, loses its nodes, refuses it."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest

from cluster import registry
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
    workers,
    write_profile,
)
from tests.support.documents import ON_SLURM, blocks, commands
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
(folder / "nodes.new").write_text(str(sum(node["Alive"] for node in ray.nodes())))
(folder / "nodes.new").rename(folder / "nodes")
while not (folder / "go").exists():
    time.sleep(0.1)
print("answer", ray.get(ray.remote(lambda: 42).remote()), flush=True)
if ray.cluster_resources().get("GPU"):
    print("GPU", ray.get(ray.remote(num_gpus=1)(lambda: os.environ["CUDA_VISIBLE_DEVICES"]).remote()), flush=True)
"""

APPTAINER = """#!/bin/sh
echo "$@" >> '{calls}'
while [ "$1" != zerofleet.sif ]; do shift; done
shift
exec "$@"
"""
"""Stands for the command of this name, and runs in no container what should run in one."""


class Job:
    """A job whose driver says how many Ray nodes it sees and waits to be told to go on."""

    def __init__(self, folder: Path, nodes: int, gpus: int = 0, **slurm) -> None:
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
            gpus_per_node=gpus,
            save_before_end_seconds=60,
            progress_directory=folder / "checkpoints",
        )
        self.submitted = BACKEND.submit(self.request)
        self.record = JobRecord(
            id=registry.new_id(),
            name=folder.name,
            backend="slurm",
            backend_id=self.submitted.backend_id,
            run_directory=str(folder),
            job_directory=str(self.request.job_directory),
            argv=self.request.argv,
            submitted=time.time(),
            profile="lab",
            nodes=nodes,
        )
        registry.add(self.record)

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
        wait_for((self.folder / "nodes").exists, "driver", 150)
        return int((self.folder / "nodes").read_text())

    def log(self) -> str:
        return BACKEND.log(self.record, 0, None).read(0).decode()


@pytest.fixture
def submit(slurm_here: SlurmCluster, zerofleet: Zerofleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Submits such jobs; the command line finds them, too."""
    monkeypatch.setenv("XDG_STATE_HOME", zerofleet.environment["XDG_STATE_HOME"])
    jobs: list[Job] = []

    def make(name: str, nodes: int = 1, **settings) -> Job:
        jobs.append(Job(tmp_path / name, nodes, **settings))
        return jobs[-1]

    yield make
    for job in jobs:
        slurm_here.command("scancel", job.record.backend_id)
        job.wait_for(*(state for state in JobState if state.is_final))


def test_two_jobs_on_one_node_leave_each_others_ray_and_gpus_alone(
    submit: Callable[..., Job], zerofleet: Zerofleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The second one in a container, and in a partition that bounds time, with no time limit of its own."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    (folder / "apptainer").write_text(APPTAINER.format(calls=calls))
    (folder / "apptainer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    container = {
        "runtime": "apptainer",
        "image": "zerofleet.sif",
        "python": sys.executable,
        "mounts": [f"{tmp_path}:{tmp_path}"],
        "arguments": ["--nv"],
    }
    first = submit("first", nodelist="n2", gpus=1)
    second = submit("second", nodelist="n2", gpus=1, partition="short", time_limit=None, container=container)
    assert [job.wait_for_driver() for job in (first, second)] == [1, 1], "each sees its own Ray only"
    assert (
        f"exec --bind {tmp_path}:{tmp_path} --nv zerofleet.sif {sys.executable} -P -u -m submitit" in calls.read_text()
    )
    assert first.status().state is second.status().state is JobState.RUNNING
    assert "saves and ends" in zerofleet.ok("cancel", first.record.id, "--wait")
    status = zerofleet.status(first.record.id)
    assert (status["state"], status["reason"]) == ("STOPPED", "SIGTERM: saved and ended")
    assert (first.folder / "saved").exists()
    assert_nothing_left(first.folder)
    assert processes_of(second.folder)
    (second.folder / "go").touch()
    second.wait_for(JobState.COMPLETED)
    assert "answer 42" in second.log(), "its Ray still worked"
    assert "GPU 1\n" in second.log(), "the other one had GPU 0"
    assert_nothing_left(second.folder)
    code, _, err = zerofleet.run("cancel", second.record.id)
    assert (code, err) == (2, f"job {second.record.id} has ended already: COMPLETED\n")


@pytest.mark.timeout(600)
def test_preemption_a_killed_slurmd_and_a_scancel_from_outside(submit: Callable[..., Job], slurm_here: SlurmCluster):
    job = submit("job", nodes=2)
    assert job.wait_for_driver() == 2
    slurm_here.command(
        "sbatch", "--partition=high", "--nodelist=n2", "--exclusive", "--output=/dev/null", "--wrap=true"
    )
    job.wait_for(JobState.PENDING)
    assert (job.folder / "saved").exists()
    assert "SIGUSR2: saved and ended, to be requeued" in BACKEND.log(job.record, 0, 1).read(0).decode()
    (job.folder / "nodes").unlink()

    assert job.wait_for_driver() == 2
    slurm_here.stop("n2", signal.SIGKILL)
    try:
        status = job.wait_for(JobState.PENDING)
        assert status.native == "PENDING"
        waiting = wait_for(lambda: job.status().reason not in ("", "BeginTime") and job.status(), "a reason", 30)
        assert (waiting.state, waiting.starts) == (JobState.PENDING, 2)
        (job.folder / "nodes").unlink()
    finally:
        slurm_here.start_node("n2")
    assert job.wait_for_driver() == 2
    assert (job.status().state, job.status().starts) == (JobState.RUNNING, 3)
    slurm_here.command("scancel", job.record.backend_id)
    status = job.wait_for(JobState.CANCELLED)
    assert (status.native, status.reason) == ("CANCELLED", "SIGTERM: saved and ended")
    assert_nothing_left(job.folder)


@contextmanager
def paused(run_directory: Path) -> Iterator[None]:
    """Have a run's workers stand still, as on a very slow machine, so that it is not over before Slurm looks at it."""
    processes = [worker["pid"] for worker in workers(run_directory)]
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            os.kill(process, signal.SIGCONT)


@pytest.mark.timeout(600)
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
    zerofleet.wait_for_state(job, "RUNNING")  # now the first start has ended, and has written all of its steps
    reached = max(losses(run_directory))
    wait_for_step(run_directory, reached + 5)

    with paused(run_directory):
        # So long that the warning, 100 s before (save_before_end_seconds), is due: it comes when Slurm looks next.
        began = datetime.fromisoformat(slurm.command("squeue", "--noheader", "--jobs", slurm_id, "--format=%S"))
        minutes = max(2, int((time.time() - began.timestamp() + 100) / 60))
        slurm.command("scontrol", "update", f"JobId={slurm_id}", f"TimeLimit={minutes}")
        warning = "SIGUSR2: the driver saves and ends"
        wait_for(lambda: warning in zerofleet.ok("logs", job, "--start", "2"), "warning", 90, every=1.5)
    zerofleet.wait_for_state(job, "PENDING")
    slurm.command("scontrol", "update", f"JobId={slurm_id}", "TimeLimit=30")
    status = zerofleet.wait_for_state(job, "COMPLETED")
    assert status["starts"] == 3
    assert "SIGUSR2: saved and ended, to be requeued" in zerofleet.ok("logs", job, "--start", "2")
    events = read_json_lines(RunDirectory.at(run_directory).events)
    stop = [event["step"] for event in events if event["state"] == "stopped"][-1]
    assert reached + 5 <= stop < LONG, "it saved where it was"
    assert f"resuming from step_{stop:08d}" in zerofleet.ok("logs", job)

    wait_for_step(uninterrupted, LONG)
    expected = losses(uninterrupted)
    assert losses(run_directory) == {step: expected[step] for step in range(1, LONG + 1)}
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


def test_an_array_behind_another_job_runs_its_tasks_one_after_the_other(
    submit: Callable[..., Job], slurm_here: SlurmCluster
):
    other = re.search(r"\d+", slurm_here.command("sbatch", "--output=/dev/null", "--wrap=sleep 600"))
    assert other is not None
    job = submit("array", dependency=f"afterany:{other.group()}", options={"array": "1-2%1"})
    (job.folder / "go").touch()
    wait_for(lambda: job.status().reason == "Dependency", "reason for waiting")
    slurm_here.command("scancel", other.group())
    status = job.wait_for(JobState.COMPLETED, timeout=120)
    assert status.starts == 2
    assert ["answer 42" in BACKEND.log(job.record, 0, start).read(0).decode() for start in (1, 2)] == [True, True]
    assert_nothing_left(job.folder)


def test_a_job_that_fails_before_its_agents_shows_what_its_script_wrote(submit: Callable[..., Job]):
    job = submit("broken", setup=["echo no such module: cuda >&2; exit 3"])
    status = job.wait_for(JobState.FAILED)
    assert status.reason.startswith("it failed before ZeroFleet began on its nodes; ")
    assert status.reason.endswith("\nno such module: cuda")


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


def test_the_readmes_five_minutes_on_slurm(zerofleet: Zerofleet, slurm: SlurmCluster, tmp_path: Path):
    (recipe,) = blocks("README.md", "yaml")
    (tmp_path / "my-recipe.yaml").write_text(recipe)
    (tmp_path / "texts").mkdir()
    for module in (Path(json.__file__).parent).glob("*.py"):
        shutil.copy(module, tmp_path / "texts" / f"{module.stem}.txt")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **zerofleet.environment, "PATH": path, "ZEROFLEET_CACHE": str(tmp_path / "cache")}
    told = []
    for command in commands("README.md", ON_SLURM):
        done = subprocess.run(
            shlex.split(command),
            cwd=tmp_path,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        told.append(done.stdout)
    _, shown, submitted, status, log, jobs = told
    profile = (tmp_path / "my-cluster.yaml").read_text()
    assert 'partition: "debug"' in profile
    assert "# also there: high (2 nodes, 4 CPUs, 0 GPUs, infinite)" in profile
    assert shown.startswith("#!/bin/bash\n")
    assert re.search(r"my-recipe: submitted to slurm as \d+, ", submitted)
    assert re.search(r"my-recipe  (PENDING|RUNNING)", status)
    assert "the first step is made; it took" in log
    assert re.search(r"my-recipe +COMPLETED +slurm \d+ +60/60 ", jobs)


def test_an_elastic_sweep_runs_its_grid_on_the_nodes_there_are_and_compares_the_last_losses(
    zerofleet: Zerofleet, slurm: SlurmCluster, uninterrupted: Path, workplace: Path
):
    nodes = {"min": 1, "max": 4}
    profile = write_profile(workplace / "elastic.yaml", backend="slurm", nodes=nodes, slurm={"time_limit": "10"})
    grid = ("learning_rate=1e-3,3e-2", "max_steps=4")
    options = ("--profile", str(profile), "--runs-dir", str(workplace / "sweep"), "--json")
    records = json.loads(zerofleet.ok("sweep", str(zerofleet.recipe), *grid, *options))
    assert len({record["sweep"] for record in records}) == 1
    for record in records:
        zerofleet.wait_for_state(record["id"], "COMPLETED")
    runs = [Path(record["run_directory"]) for record in records]
    last = [losses(run)[4] for run in runs]
    assert last[0] != last[1]
    wait_for_step(uninterrupted, 4)
    expected = losses(uninterrupted)
    assert losses(runs[0]) == pytest.approx({step: expected[step] for step in range(1, 5)}, abs=1e-5)
    assert {len(workers(run)) for run in runs} <= {1, 2}, "there are no four"
    rows = [re.split("  +", row) for row in zerofleet.ok("jobs", "--sweep", records[0]["sweep"]).splitlines()[1:]]
    assert [row[:3] for row in rows] == [[record["id"], "tiny", "COMPLETED"] for record in records]
    assert [row[4:7] for row in rows] == [
        ["4/4", f"{loss:.4f}", f"learning_rate={rate}"] for loss, rate in zip(last, ("1e-3", "3e-2"), strict=True)
    ]
