"""One recipe file, unedited, on every backend: the same losses, and what each of them promises on the way."""

import re
from pathlib import Path
from typing import Any

import pytest

from cluster.start_folder import last_start
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
from tests.support.sshd import HOSTS, SshServer

STEPS = 12
PHASES = ["queue", "ray head", "workers joined", "driver and data", "worker group", "imports and rendezvous", "engine"]


def assert_same_losses(run_directory: Path, uninterrupted: Path, steps: int = STEPS) -> None:
    wait_for_step(uninterrupted, steps)
    expected = losses(uninterrupted)
    assert losses(run_directory) == {step: expected[step] for step in range(1, steps + 1)}, "in fp32, exactly"
    assert expected[1] > expected[steps] > 1.0


def assert_phases(status: dict[str, Any], log: str) -> None:
    """Every phase of the start is in the status, in order, and in the log."""
    assert list(status["phases"]) == [*PHASES, "first step", "in all"]
    assert sum(list(status["phases"].values())[:-1]) == pytest.approx(status["phases"]["in all"], abs=0.1)
    for phase in status["phases"]:
        assert re.search(rf"^  {phase} +\d+\.\d\d s$", log, re.MULTILINE), phase


@pytest.mark.slurm
def test_slurm_from_submit_to_the_end(zerofleet: Zerofleet, slurm: SlurmCluster, uninterrupted: Path, workplace: Path):
    run_directory = workplace / 'on slurm, it\'s "quoted"'
    profile = write_profile(workplace / "slurm.yaml", backend="slurm", slurm={"time_limit": "10"})
    shown = zerofleet.ok(
        "submit", str(zerofleet.recipe), "--profile", str(profile), "--run-dir", str(run_directory), "--dry-run"
    )
    assert not run_directory.exists(), "a dry run writes nothing"
    blocker = re.search(r"\d+", slurm.command("sbatch", "--nodes=2", "--exclusive", "--wrap=sleep 60"))
    assert blocker is not None
    job = zerofleet.submit(profile, run_directory)
    status = zerofleet.wait_for_state(job, "PENDING")
    wait_for(lambda: zerofleet.status(job)["reason"] in ("Resources", "Priority"), "reason for waiting")
    assert slurm.command("scontrol", "write", "batch_script", status["backend_id"], "-") == shown.strip()
    slurm.command("scancel", blocker.group())

    status = zerofleet.wait_for_state(job, "RUNNING")
    follower = zerofleet.process("logs", "-f", job)
    assert zerofleet.run(
        "submit", str(zerofleet.recipe), "--profile", str(profile), "--run-dir", str(run_directory)
    ) == (
        2,
        "",
        f"job {job} of {run_directory} is RUNNING; cancel it first (zerofleet cancel {job}), or take another run "
        "directory with --run-dir\n",
    )
    status = zerofleet.wait_for_state(job, "COMPLETED")
    assert status["node_names"] == ["n[1-2]"]
    followed, _ = follower.communicate(timeout=30)
    assert follower.returncode == 0
    assert followed == zerofleet.ok("logs", str(run_directory))
    assert "ray: 2 of 2 nodes are up" in followed
    assert_phases(status, followed)
    assert "ray: joined" in zerofleet.ok("logs", job, "--node", "1")
    assert_same_losses(run_directory, uninterrupted)
    assert_nothing_left(run_directory)
    start = last_start(Path(status["job_directory"]))
    assert start is not None
    assert start.head() is None, "the token is removed"
    code, _, err = zerofleet.run(
        "submit", str(zerofleet.recipe), "--profile", str(profile), "--run-dir", str(run_directory)
    )
    assert (code, err.count("complete already")) == (2, 1)


@pytest.mark.ssh
def test_ssh(zerofleet: Zerofleet, ssh_server: SshServer, uninterrupted: Path, workplace: Path):
    settings = {"hosts": list(HOSTS), "options": list(ssh_server.options)}
    profile = write_profile(workplace / "ssh.yaml", backend="ssh", ssh=settings)
    run_directory = workplace / "on-ssh"
    job = zerofleet.submit(profile, run_directory)
    assert zerofleet.status(job)["state"] == "RUNNING"
    assert processes_of(run_directory)
    status = zerofleet.wait_for_state(job, "COMPLETED")
    assert status["node_names"] == list(HOSTS)
    assert_phases(status, zerofleet.ok("logs", job))
    assert_same_losses(run_directory, uninterrupted)
    assert_nothing_left(run_directory)


@pytest.mark.ray
def test_ray(ray_cluster: tuple[Zerofleet, dict[str, Any]], uninterrupted: Path, workplace: Path):
    zerofleet, settings = ray_cluster
    profile = write_profile(workplace / "ray.yaml", **settings)
    run_directory = workplace / "on-ray"
    job = zerofleet.submit(profile, run_directory)
    follower = zerofleet.process("logs", "-f", job)
    status = zerofleet.wait_for_state(job, "COMPLETED")
    assert list(status["phases"]) == ["driver and data", *PHASES[4:], "first step", "in all"]
    followed, _ = follower.communicate(timeout=30)
    assert "the first step is made; it took" in followed
    assert_same_losses(run_directory, uninterrupted)
    places = {worker["address"] for worker in _workers(run_directory)}
    assert len(places) == 2, "one worker on each node"


@pytest.mark.ray
def test_a_ray_job_saves_when_it_is_cancelled_and_goes_on_when_it_is_submitted_again(
    ray_cluster: tuple[Zerofleet, dict[str, Any]], uninterrupted: Path, workplace: Path
):
    zerofleet, settings = ray_cluster
    profile = write_profile(workplace / "ray.yaml", **settings)
    run_directory = workplace / "cancelled-on-ray"
    job = zerofleet.submit(profile, run_directory, f"max_steps={LONG}")
    wait_for_step(run_directory, 3)
    assert "saves and ends" in zerofleet.ok("cancel", job, "--wait")
    status = zerofleet.status(job)
    assert (status["state"], status["native"]) == ("STOPPED", "FAILED")
    reached = max(losses(run_directory))
    again = zerofleet.submit(profile, run_directory, f"max_steps={LONG}")
    wait_for_step(run_directory, reached + 3)
    zerofleet.ok("cancel", again, "--now", "--wait")
    assert zerofleet.status(again)["state"] == "CANCELLED"
    made = losses(run_directory)
    wait_for_step(uninterrupted, max(made))
    expected = losses(uninterrupted)
    assert made == {step: expected[step] for step in made}
    assert zerofleet.status(str(run_directory))["id"] == again, "the newest job of the run"


@pytest.mark.ray
def test_local_on_two_ray_nodes_of_this_machine(zerofleet: Zerofleet, uninterrupted: Path):
    wait_for_step(uninterrupted, STEPS)
    status = zerofleet.status(str(uninterrupted))
    assert status["backend"] == "local"
    assert {worker["address"] for worker in _workers(uninterrupted)} == {"127.0.1.1", "127.0.1.2"}
    assert_phases(status, zerofleet.ok("logs", status["id"]))
    assert "=== attempt of" in zerofleet.ok("logs", status["id"], "--rank", "1", "--attempt", "1")
    code, _, err = zerofleet.run("logs", status["id"], "--rank", "7")
    assert (code, err.rstrip().endswith("has no log of rank 7; there are 0 to 1")) == (2, True)


def _workers(run_directory: Path) -> list[dict[str, Any]]:
    from launcher.run_directory import RunDirectory, read_json_lines

    events = read_json_lines(RunDirectory.at(run_directory).events)
    return next(event["workers"] for event in reversed(events) if event["state"] == "running")
