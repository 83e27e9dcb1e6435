"""One recipe file, unedited, on every backend: the same losses, and what each of them promises on the way."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.ray_jobs import RAYS_EXCLUDES
from cluster.start_folder import last_start
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
from tests.support.network import Network
from tests.support.slurm_cluster import SlurmCluster
from tests.support.sshd import HOSTS, SshServer

STEPS = 12
PHASES = ["queue", "ray head", "workers joined", "driver and data", "worker group", "imports and rendezvous", "engine"]


@dataclass(frozen=True)
class Life:
    """A job from its submission to its end, as the command line showed it.

    Attributes:
        run_directory: of the run.
        seen: its state and reason at each look, where they differ from the look before.
        followed: what `logs -f` wrote.
        attached: what `attach` wrote.
        status: at the end.
    """

    run_directory: Path
    seen: list[tuple[str, str]]
    followed: str
    attached: str
    status: dict[str, Any]


def live(
    zerofleet: Zerofleet, profile: Path, run_directory: Path, meanwhile: Callable[[str], Any] | None = None
) -> Life:
    """Submit the recipe and watch it to its end; `meanwhile` is called with the job's id while it waits or runs."""
    job = zerofleet.submit(profile, run_directory)
    follower, attached = zerofleet.process("logs", "-f", job), zerofleet.process("attach", job)
    seen: list[tuple[str, str]] = []

    def is_over() -> dict[str, Any] | None:
        status = zerofleet.status(job)
        if not seen or (status["state"], status["reason"]) != seen[-1]:
            seen.append((status["state"], status["reason"]))
        return _if_over(status)

    if meanwhile is not None:
        is_over()
        meanwhile(job)
    status = wait_for(is_over, f"end of {job}", timeout=180, every=0.5)
    followed, _ = follower.communicate(timeout=30)
    line, _ = attached.communicate(timeout=30)
    assert (status["state"], follower.returncode, attached.returncode) == ("COMPLETED", 0, 0), followed
    return Life(run_directory, seen, followed, line, status)


@dataclass(frozen=True)
class SlurmLife(Life):
    """On Slurm, and what was asked while it waited.

    Attributes:
        shown: what `submit --dry-run` had printed.
        received: the batch script as Slurm has it.
        second: exit code and words of another `submit` to the same run directory.
    """

    shown: bytes
    received: bytes
    second: tuple[int, str]


@pytest.fixture(scope="module")
def on_slurm(zerofleet: Zerofleet, slurm: SlurmCluster, workplace: Path) -> SlurmLife:
    run_directory = workplace / 'on slurm, it\'s "quoted"'
    logs = str(workplace / "the logs")
    profile = write_profile(workplace / "slurm.yaml", backend="slurm", slurm={"time_limit": "10"}, log_directory=logs)
    arguments = ("submit", str(zerofleet.recipe), "--profile", str(profile), "--run-dir", str(run_directory))
    shown = zerofleet.ok(*arguments, "--dry-run").encode()
    assert not run_directory.exists(), "a dry run writes nothing"
    sleep = ("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 60")
    blocker = re.search(r"\d+", slurm.command("sbatch", *sleep))
    assert blocker is not None
    received = workplace / "received.sh"
    second: list[tuple[int, str]] = []

    def meanwhile(job: str) -> None:
        wait_for(lambda: zerofleet.status(job)["reason"] in ("Resources", "Priority"), "reason for waiting")
        slurm.command("scontrol", "write", "batch_script", zerofleet.status(job)["backend_id"], str(received))
        code, _, err = zerofleet.run(*arguments)
        second.append((code, err.replace(job, "JOB")))
        slurm.command("scancel", blocker.group())

    life = live(zerofleet, profile, run_directory, meanwhile)
    return SlurmLife(**vars(life), shown=shown, received=received.read_bytes(), second=second[0])


@pytest.fixture(scope="module")
def on_ssh(zerofleet: Zerofleet, ssh_server: SshServer, workplace: Path) -> Life:
    settings = {"hosts": list(HOSTS), "options": list(ssh_server.options)}
    profile = write_profile(workplace / "ssh.yaml", backend="ssh", ssh=settings)
    run_directory = workplace / 'on ssh,\nit\'s "quoted"'
    return live(zerofleet, profile, run_directory, lambda job: processes_of(run_directory) or pytest.fail("no process"))


@dataclass(frozen=True)
class RayLife(Life):
    """On a Ray cluster that was there before.

    Attributes:
        shown: the request that `submit --dry-run` had printed.
        received: the job as the cluster has it.
        folder: what is in the driver's working directory.
    """

    shown: dict[str, Any]
    received: dict[str, Any]
    folder: list[str]


ASK = """
import os, sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]})
print(urllib.request.urlopen(request).read().decode())
"""


@pytest.fixture(scope="module")
def on_ray(ray_cluster: tuple[Zerofleet, dict[str, Any]], workplace: Path) -> RayLife:
    zerofleet, settings = ray_cluster
    folder = workplace / "to send"
    folder.mkdir()
    for name in ("sent.txt", "left-out.ckpt", "left-out.log"):
        (folder / name).write_text(name)
    (folder / ".gitignore").write_text("*.log\n")
    sent = {**settings["ray"], "working_directory": str(folder), "excludes": ["*.ckpt"]}
    values = {**settings, "ray": sent, "memory_per_worker_gib": 0.25}
    profile = write_profile(workplace / "ray-and-folder.yaml", **values)
    run_directory = workplace / 'on ray,\nit\'s "quoted"'
    options = ("--profile", str(profile), "--run-dir", str(run_directory), "--dry-run")
    shown = json.loads(zerofleet.ok("submit", str(zerofleet.recipe), *options))
    received: dict[str, Any] = {}
    found: list[str] = []

    def driver_folder() -> list[str] | None:
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                command = process.cmdline()
                if "launcher.orchestration.driver" in command and str(run_directory) in command:
                    return sorted(path.name for path in Path(f"/proc/{process.pid}/cwd").iterdir())
        return None

    def meanwhile(job: str) -> None:
        found.extend(wait_for(driver_folder, "driver of the job", timeout=120))
        record = json.loads((workplace / "state" / "zerofleet" / "jobs" / f"{job}.json").read_text())
        ask = zerofleet.prefix(sys.executable, "-c", ASK, f"{record['facts']['url']}/api/jobs/{record['backend_id']}")
        environment = {**os.environ, **zerofleet.environment}
        done = subprocess.run(ask, env=environment, capture_output=True, text=True, timeout=60, check=True)
        received.update(json.loads(done.stdout))

    life = live(zerofleet, profile, run_directory, meanwhile)
    return RayLife(**vars(life), shown=shown, received=received, folder=found)


@pytest.fixture(scope="module")
def recipe_digest(zerofleet: Zerofleet) -> str:
    """Of the recipe file, before anything is submitted."""
    return hashlib.sha256(zerofleet.recipe.read_bytes()).hexdigest()


@pytest.mark.slurm
@pytest.mark.ssh
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_one_recipe_unedited_has_the_same_losses_on_every_backend(
    recipe_digest: str, uninterrupted: Path, on_slurm: Life, on_ssh: Life, on_ray: Life, zerofleet: Zerofleet
):
    wait_for_step(uninterrupted, STEPS)
    expected = {step: loss for step, loss in losses(uninterrupted).items() if step <= STEPS}
    assert list(expected) == list(range(1, STEPS + 1))
    assert expected[1] > expected[STEPS] > 1.0
    lives = {"slurm": on_slurm, "ssh": on_ssh, "ray": on_ray}
    made = {backend: losses(life.run_directory) for backend, life in lives.items()}
    assert made == dict.fromkeys(made, expected), "in fp32, exactly"
    assert {backend: life.status["backend"] for backend, life in lives.items()} == {name: name for name in lives}
    assert zerofleet.status(str(uninterrupted))["backend"] == "local"
    runs = [uninterrupted, *(life.run_directory for life in lives.values())]
    places = [{worker["address"] for worker in workers(run)} for run in runs]
    assert [len(found) for found in places] == [2, 2, 2, 2], "two workers, each on a node of its own"
    assert hashlib.sha256(zerofleet.recipe.read_bytes()).hexdigest() == recipe_digest


@pytest.mark.slurm
def test_what_slurm_received_is_the_dry_run_byte_for_byte(on_slurm: SlurmLife):
    assert on_slurm.received == on_slurm.shown
    assert on_slurm.received.startswith(b"#!/bin/bash\n")


@pytest.mark.slurm
def test_slurm_from_submit_to_the_end(on_slurm: SlurmLife, zerofleet: Zerofleet, workplace: Path):
    states = [state for state, _ in on_slurm.seen]
    assert sorted(set(states), key=states.index) == ["PENDING", "RUNNING", "COMPLETED"]
    assert on_slurm.status["node_names"] == ["n[1-2]"]
    run_directory = str(on_slurm.run_directory)
    assert on_slurm.followed == zerofleet.ok("logs", run_directory)
    assert re.search(rf"^COMPLETED \| step {STEPS}/{STEPS} \| loss \d.*\n\Z", on_slurm.attached, re.MULTILINE)
    assert "ray: 2 of 2 nodes are up" in on_slurm.followed
    assert_phases(on_slurm.status, on_slurm.followed, zerofleet.ok("status", run_directory))
    assert "ray: joined" in zerofleet.ok("logs", run_directory, "--node", "1")
    (elsewhere,) = workplace.joinpath("the logs").iterdir()
    assert elsewhere.name.startswith("on slurm, it's ")
    assert (elsewhere / "rank_00001.log").read_text() == zerofleet.ok("logs", run_directory, "--rank", "1")
    assert_nothing_left(on_slurm.run_directory)
    start = last_start(Path(on_slurm.status["job_directory"]))
    assert start is not None
    assert start.head() is None, "the token is removed"


@pytest.mark.slurm
def test_one_job_at_a_time_in_a_run_directory(on_slurm: SlurmLife, zerofleet: Zerofleet, workplace: Path):
    told = (
        f"job JOB of {on_slurm.run_directory} is PENDING; cancel it first (zerofleet cancel JOB), or take another run "
        "directory with --run-dir\n"
    )
    assert on_slurm.second == (2, told)
    options = ("--profile", str(workplace / "slurm.yaml"), "--run-dir", str(on_slurm.run_directory))
    code, _, err = zerofleet.run("submit", str(zerofleet.recipe), *options)
    assert (code, err.count("complete already")) == (2, 1)


@pytest.mark.ssh
def test_ssh_and_a_record_that_is_lost(on_ssh: Life, zerofleet: Zerofleet, workplace: Path):
    assert on_ssh.status["node_names"] == list(HOSTS)
    assert_phases(on_ssh.status, on_ssh.followed, zerofleet.ok("status", on_ssh.status["id"]))
    assert_nothing_left(on_ssh.run_directory)
    record = workplace.joinpath("state", "zerofleet", "jobs", f"{on_ssh.status['id']}.json")
    before = record.read_text()
    record.unlink()
    assert zerofleet.run("status", on_ssh.status["id"])[0] == 2
    assert zerofleet.status(str(on_ssh.run_directory)) == on_ssh.status, "adopted by the run directory"
    assert json.loads(record.read_text()) == json.loads(before)
    listed = zerofleet.ok("jobs", "--all").splitlines()[1:]
    assert len(listed) == len(list(record.parent.glob("*.json"))), "a line each, whatever their paths hold"


@pytest.mark.ray
def test_what_ray_received_is_the_dry_run(on_ray: RayLife):
    for key in ("entrypoint", "metadata"):
        assert on_ray.received[key] == on_ray.shown[key]
    sent, shown = on_ray.received["runtime_env"], on_ray.shown["runtime_env"]
    assert sent["env_vars"] == shown["env_vars"]
    assert {*RAYS_EXCLUDES, "*.log", "*.ckpt"} == set(shown["excludes"])
    assert on_ray.folder == [".gitignore", "sent.txt"]


@pytest.mark.ray
def test_ray(on_ray: RayLife):
    assert list(on_ray.status["phases"]) == ["driver and data", *PHASES[4:], "first step", "in all"]
    assert "the first step is made; it took" in on_ray.followed
    assert_nothing_left(on_ray.run_directory)


@pytest.mark.ray
def test_a_ray_job_saves_when_it_is_cancelled_and_goes_on_when_it_is_submitted_again(
    ray_cluster: tuple[Zerofleet, dict[str, Any]], uninterrupted: Path, workplace: Path
):
    zerofleet, settings = ray_cluster
    profile = write_profile(workplace / "ray.yaml", **settings)
    run_directory = workplace / "cancelled-on-ray"
    job = zerofleet.submit(profile, run_directory, "max_steps=10_000")
    wait_for_step(run_directory, 3)
    assert "saves and ends" in zerofleet.ok("cancel", job, "--wait")
    status = zerofleet.status(job)
    assert (status["state"], status["native"]) == ("STOPPED", "FAILED")
    reached = max(losses(run_directory))
    again = zerofleet.submit(profile, run_directory, "max_steps=10_000")
    wait_for_step(run_directory, reached + 3)
    zerofleet.ok("cancel", again, "--now", "--wait")
    assert zerofleet.status(again)["state"] == "CANCELLED"
    made = {step: loss for step, loss in losses(run_directory).items() if step <= LONG}
    wait_for_step(uninterrupted, max(made))
    expected = losses(uninterrupted)
    assert made == {step: expected[step] for step in made}
    assert zerofleet.status(str(run_directory))["id"] == again, "the newest job of the run"


@pytest.mark.ray
def test_a_machine_that_does_not_see_the_run_directory_is_named(
    machines: Network, ray_cluster: tuple[Zerofleet, dict[str, Any]], workplace: Path
):
    zerofleet, settings = ray_cluster
    profile = write_profile(workplace / "ray.yaml", **settings)
    own = workplace / "not shared"
    own.mkdir()
    second = machines.machines[1]
    subprocess.run(second.command("mount", "-t", "tmpfs", "none", str(own)), check=True)
    try:
        first = replace(zerofleet, prefix=machines.machines[0].command)
        job = first.submit(profile, own / "run")
        status = wait_for(lambda: _if_over(first.status(job)), f"end of {job}", timeout=90)
    finally:
        subprocess.run(second.command("umount", str(own)), check=True)
    assert status["state"] == "FAILED"
    told = f"error: {second.name}: does not see what {machines.machines[0].name} writes to {own / 'run'}"
    assert f"{told}; use a file system that all nodes share" in first.ok("logs", job)


def _if_over(status: dict[str, Any]) -> dict[str, Any] | None:
    return None if status["state"] in ("PENDING", "RUNNING") else status


@pytest.mark.ray
def test_local_on_two_ray_nodes_of_this_machine(zerofleet: Zerofleet, uninterrupted: Path):
    wait_for_step(uninterrupted, STEPS)
    status = zerofleet.status(str(uninterrupted))
    assert {worker["address"] for worker in workers(uninterrupted)} == {"127.0.1.1", "127.0.1.2"}
    assert_phases(status, zerofleet.ok("logs", status["id"]), zerofleet.ok("status", status["id"]))
    assert "=== attempt of" in zerofleet.ok("logs", status["id"], "--rank", "1", "--attempt", "1")
    code, _, err = zerofleet.run("logs", status["id"], "--rank", "7")
    assert (code, err.rstrip().endswith("has no log of rank 7; there are 0 to 1")) == (2, True)


def assert_phases(status: dict[str, Any], *texts: str) -> None:
    """Every phase of the start is in the status as JSON, in order, and in the log and the status as text."""
    assert list(status["phases"]) == [*PHASES, "first step", "in all"]
    assert sum(list(status["phases"].values())[:-1]) == pytest.approx(status["phases"]["in all"], abs=0.1)
    for phase in status["phases"]:
        for text in texts:
            assert re.search(rf"^  {phase} +\d+\.\d\d s$", text, re.MULTILINE), phase
