"""A lost worker or node costs a few steps and no disk: real workers on real Ray go on from their nodes' memory."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.ray_node import RayNode
from launcher.checkpoints import folders
from launcher.checkpoints.fault_plan import SWITCH
from launcher.run_directory import RunDirectory, read_json_lines
from tests.orchestration.conftest import Zerofleet, records, wait_for, wait_for_step, worker_pids
from tests.orchestration.fault_cells import LENGTH, Cell, Moments, check_account, incidents, steps_made_again
from tests.support.ray_cluster import HostRay
from tests.support.unmeasured import unmeasured

pytestmark = [pytest.mark.ray, pytest.mark.distributed]

EVERY = 5
KEEPING = (
    f"fault_tolerance.memory_checkpoint.every_steps={EVERY}",
    *("max_restarts=20", "max_start_failures=20", "restart_delay_seconds=0", "exclude_node_after=null"),
)


def resumed(directory: RunDirectory) -> list[tuple[str, int]]:
    """Where attempts began, as the events tell; one that read a checkpoint has none."""
    return [(e["from"], e["step"]) for e in read_json_lines(directory.events) if e["state"] == "resumed"]


def test_a_lost_worker_costs_a_few_steps_and_no_disk(
    zerofleet: Zerofleet, uninterrupted: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "faults.json"
    chain = [
        Cell("memory", "memory.begins", 1, 1),  # no room at the first time: the run goes on
        Cell("sigkill", "phase.forward", 1, 38),
        Cell("sigkill", "memory.copied", 1, 9),  # half-delivered: rank 0's part is there, rank 1's is not
        Cell("sigkill", "phase.backward", 0, 123),  # there is a checkpoint on disk by now, and memory is newer
    ]
    plan.write_text(json.dumps([asdict(cell) for cell in chain]))
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(plan))
    directory = RunDirectory.at(tmp_path / "run")
    saving = ("save_steps=100", "asynchronous=false")
    command = ("run", str(zerofleet.recipe), "--run-dir", str(directory.path), *KEEPING, *saving)
    code, _, err = zerofleet.run(*command, timeout=200)
    assert code == 0, err
    assert records(directory) == records(uninterrupted), "weights, samples and dropout of one and the same step"
    assert resumed(directory) == [("memory", 35), ("memory", 75), ("memory", 120)]
    assert [(event["saved_step"], event["kept_step"]) for event in incidents(directory)] == [
        (0, 35),
        (0, 75),
        (100, 120),
    ]
    assert "resumed from memory at step 35" in err
    assert "the state of step 5 is not kept in memory (fault_tolerance.memory_checkpoint)" in err
    assert len(steps_made_again(directory)) == 3
    assert max(steps_made_again(directory)) <= EVERY
    assert [folder.name for folder in folders.complete(directory.checkpoints)] == ["step_00000100", "step_00000150"]
    check_account(directory)


@pytest.mark.exhaustive
def test_without_room_in_memory_the_disk_is_what_a_restart_goes_back_to(
    zerofleet: Zerofleet, uninterrupted: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = tmp_path / "faults.json"
    refused = {**asdict(Cell("memory", "memory.begins", 1)), "always": True}
    plan.write_text(json.dumps([refused, asdict(Cell("sigkill", "phase.forward", 1, 88))]))
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(plan))
    directory = RunDirectory.at(tmp_path / "run")
    command = ("run", str(zerofleet.recipe), "--run-dir", str(directory.path), *KEEPING)
    code, _, err = zerofleet.run(*command, "save_steps=40", "asynchronous=false", timeout=200)
    assert code == 0, err
    assert records(directory) == records(uninterrupted)
    assert resumed(directory) == []
    (incident,) = incidents(directory)
    assert incident["saved_step"] == 80
    assert "kept_step" not in incident
    assert steps_made_again(directory) == [8]
    assert err.count("has no memory left; the checkpoints on disk are what a restart goes back to") == 2, "each attempt"
    check_account(directory)


@pytest.mark.exhaustive
@pytest.mark.timeout(400)
def test_a_lost_node_is_made_up_for_by_its_neighbour_and_at_another_size(
    tiny_recipe: Path, uninterrupted: RunDirectory, tmp_path: Path
) -> None:
    with unmeasured():
        cluster = HostRay(nodes=3, cpus=1)
        cluster.__enter__()
    try:
        directory = RunDirectory.at(tmp_path / "run")
        (tmp_path / "lab.yaml").write_text(
            "name: lab\nbackend: ray\nnodes: {min: 1, max: 2}\nworkers_per_node: 1\ndevice: cpu\n"
        )
        moments = Moments.of([Cell("raylet", "phase.data", 0, 33), Cell("raylet", "phase.data", 0, 62)], tmp_path)
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "launcher.cli.main", "run", str(tiny_recipe), "--run-dir", str(directory.path)),
                *("--profile", str(tmp_path / "lab.yaml"), *KEEPING, "save_steps=100", "preflight=false"),
            ],
            env={**os.environ, **cluster.environment, SWITCH: str(moments.plan)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for lost in range(2):
            place = moments.next(list(range(lost)), timeout=120)
            raylet = raylet_beside_the_head(cluster.started, directory)
            raylet.send_signal(signal.SIGKILL)
            moments.release(place)
            wait_for(lambda lost=lost: len(incidents(directory)) > lost, "notice of the node's end", timeout=60)
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
    finally:
        process.kill()
        cluster.__exit__()
    first, second = incidents(directory)
    assert (first["saved_step"], second["saved_step"]) == (0, 0)
    assert first["kept_step"] in (25, 30), "the newest may have been on its way to the neighbour"
    assert second["kept_step"] in (55, 60)
    assert resumed(directory) == [("memory", first["kept_step"])], "at another size it goes through the disk"
    assert f"the state of step {second['kept_step']} in memory is written to be converted" in err
    running = [event for event in read_json_lines(directory.events) if event["state"] == "running"]
    assert [len(event["workers"]) for event in running] == [2, 2, 1]
    losses, expected = records(directory)[0], records(uninterrupted)[0]
    assert [losses[step] for step in range(1, 56)] == [expected[step] for step in range(1, 56)]
    consumed = [record["consumed_samples"] for record in read_json_lines(directory.metrics) if "loss" in record]
    assert consumed == [8 * step for step in range(1, LENGTH + 1)], "no sample lost or repeated at either size"
    check_account(directory)


def raylet_beside_the_head(nodes: list[RayNode], directory: RunDirectory) -> psutil.Process:
    """The raylet of a worker's node that is not the cluster's head, whose end would be everybody's."""
    started = {child.pid for node in nodes[1:] for child in psutil.Process(node.process.pid).children()}
    parents = [psutil.Process(pid).parent() for pid in worker_pids(directory).values()]
    return next(parent for parent in parents if parent is not None and parent.pid in started)


LAYOUTS: list[tuple[str, ...]] = [
    ("zero.stage=3", "training.ema.decay=0.9"),
    ("zero.stage=0",),
    ("zero.stage=1", "parallel.tensor_parallel_size=2"),
    ("zero.stage=1", "parallel.pipeline_parallel_size=2"),
    ("zero.stage=3", "parallel.sequence_parallel_size=2"),
    ("zero.stage=3", "precision=bf16", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_every_layout_comes_back_from_memory(
    layout: tuple[str, ...], zerofleet: Zerofleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = Moments.of([Cell("sigkill", "phase.data", 1, 13)], tmp_path)
    monkeypatch.setitem(zerofleet.environment, SWITCH, str(moments.plan))
    directory = RunDirectory.at(tmp_path / "run")
    process = zerofleet.start(
        *("run", str(zerofleet.recipe), "--run-dir", str(directory.path), *KEEPING, *layout),
        *("max_steps=20", "model.config.attention_dropout=0.0", "save_steps=100"),
    )
    moments.next([], timeout=120)
    wait_for_step(directory, 13)
    before: dict[int, Any] = records(directory)[0]
    os.kill(worker_pids(directory)[1], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert resumed(directory) == [("memory", 10)], err
    after = records(directory)[0]
    assert sorted(after) == list(range(1, 21))
    assert {step: after[step] for step in before} == before, "what is done again is what was done"
