"""An elastic job in a real Slurm loses a node: it goes on with the others, and is requeued without its first one."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launcher.checkpoints.fault_plan import SWITCH
from launcher.orchestration.journal import read_account
from launcher.run_directory import RunDirectory, read_json_lines
from tests.jobs.conftest import (
    LONG,
    Zerofleet,
    assert_nothing_left,
    losses,
    wait_for,
    wait_for_step,
    write_profile,
)
from tests.support.slurm_cluster import SlurmCluster

pytestmark = [pytest.mark.slurm, pytest.mark.exhaustive, pytest.mark.timeout(600)]

SETTINGS = (f"max_steps={LONG}", "save_steps=10", "fault_tolerance.node_timeout_seconds=5", "preflight=false")


@contextmanager
def without_power(slurm: SlurmCluster, name: str) -> Iterator[None]:
    slurm.power_off(name)
    try:
        yield
    finally:
        slurm.start_node(name)
        state = ("sinfo", "--noheader", "--partition=debug", f"--nodes={name}", "--format=%T")
        wait_for(lambda: slurm.command(*state) == "idle", f"{name} idle", 90)


def sizes(directory: RunDirectory) -> list[int]:
    running = [event for event in read_json_lines(directory.events) if event["state"] == "running"]
    return [len(event["workers"]) for event in running]


def test_a_job_goes_on_with_the_nodes_that_slurm_leaves_it(
    zerofleet: Zerofleet, slurm: SlurmCluster, uninterrupted: Path, workplace: Path
) -> None:
    nodes = {"min": 1, "max": 2}
    profile = write_profile(workplace / "lossy.yaml", backend="slurm", nodes=nodes, slurm={"time_limit": "30"})
    directory = RunDirectory.at(workplace / "lossy")
    job = zerofleet.submit(profile, directory.path, *SETTINGS)
    slurm_id = zerofleet.status(job)["backend_id"]
    wait_for_step(directory.path, 12)
    with without_power(slurm, "n2"):
        wait_for(lambda: sizes(directory) == [2, 1], "attempt on one node", 120)
        left = lambda: slurm.command("squeue", "-h", "-j", slurm_id, "-o", "%T %N")  # noqa: E731
        wait_for(lambda: left() == "RUNNING n1", "Slurm's notice of the loss", 60)
        status = zerofleet.wait_for_state(job, "COMPLETED")
    assert status["starts"] == 1, "the allocation stayed"
    assert sizes(directory) == [2, 1]
    assert slurm.command("scontrol", "show", "job", slurm_id).split("ExitCode=")[1].split()[0] == "0:0"
    same_losses(directory, uninterrupted)
    assert_nothing_left(directory.path)


def test_a_node_whose_ray_ended_joins_again_and_the_run_grows(
    zerofleet: Zerofleet, slurm: SlurmCluster, uninterrupted: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = workplace / "faults.json"
    # So slow that the node is back long before the end; not any more when it is.
    slow = {"fault": "slow", "point": "phase.data", "rank": 0, "step": None, "seconds": 0.5}
    faults.write_text(json.dumps([slow]))
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(faults))
    nodes = {"min": 1, "max": 2}
    profile = write_profile(workplace / "cut.yaml", backend="slurm", nodes=nodes, slurm={"time_limit": "30"})
    directory = RunDirectory.at(workplace / "cut")
    job = zerofleet.submit(profile, directory.path, *SETTINGS, "resize_interval_seconds=1")
    wait_for_step(directory.path, 12)
    (raylet,) = [process for process in slurm.processes_of("n2") if process.name() == "raylet"]
    raylet.kill()
    wait_for(lambda: sizes(directory) == [2, 1], "attempt on one node", 120)
    wait_for(lambda: sizes(directory) == [2, 1, 2], "attempt on both nodes", 120)
    faults.with_suffix(".new").write_text("[]")
    faults.with_suffix(".new").replace(faults)
    status = zerofleet.wait_for_state(job, "COMPLETED")
    assert status["starts"] == 1
    assert "ray: it ended here; joining again" in zerofleet.ok("logs", job, "--node", "1")
    same_losses(directory, uninterrupted)
    assert_nothing_left(directory.path)


def test_a_job_whose_first_node_is_lost_is_requeued_and_resumes(
    zerofleet: Zerofleet, slurm: SlurmCluster, uninterrupted: Path, workplace: Path
) -> None:
    nodes = {"min": 1, "max": 2}
    profile = write_profile(workplace / "headless.yaml", backend="slurm", nodes=nodes, slurm={"time_limit": "30"})
    directory = RunDirectory.at(workplace / "headless")
    job = zerofleet.submit(profile, directory.path, *SETTINGS)
    wait_for_step(directory.path, 12)
    with without_power(slurm, "n1"):
        wait_for(lambda: zerofleet.status(job)["starts"] == 2, "second start", 200, every=2)
        status = zerofleet.wait_for_state(job, "COMPLETED")
    assert status["starts"] == 2
    assert sizes(directory) == [2, 1]
    told = zerofleet.ok("logs", job, "--node", "1", "--start", "1")
    assert "the first node, n1, is lost; to be requeued" in told
    same_losses(directory, uninterrupted)
    assert_nothing_left(directory.path)


def same_losses(directory: RunDirectory, uninterrupted: Path) -> None:
    wait_for_step(uninterrupted, LONG)
    records = [record for record in read_json_lines(directory.metrics) if "loss" in record]
    assert [record["consumed_samples"] for record in records] == [16 * step for step in range(1, LONG + 1)]
    assert losses(directory.path) == pytest.approx(losses(uninterrupted), abs=1e-5)
    account = read_account(directory)
    assert sum(account.seconds.values()) == pytest.approx(account.wall, rel=0.01)
