"""Three machines (namespaces), one of which dies and returns: 3, 2, 3 workers, and the losses of a fixed size."""

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from launcher.checkpoints.fault_plan import SWITCH
from launcher.orchestration.elastic import Elastic
from launcher.orchestration.journal import read_account
from launcher.planning.layout import Resources
from launcher.planning.plan import Plan, make_plan
from launcher.recipe.loading import read_recipe
from launcher.run_directory import RunDirectory, read_json_lines
from tests.orchestration.conftest import wait_for, wait_for_step
from tests.support.network import Network, missing
from tests.support.ray_cluster import NetworkRay
from tests.support.unmeasured import unmeasured

RECIPE = """
name: tiny
seed: 7
model:
  config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, max_position_embeddings: 64}}
tokenizer: {{train: {{vocab_size: 320}}}}
data:
  sources: [{{type: text, sample_by: paragraph, files: ["{stdlib}/json/*.py", "{stdlib}/email/*.py"]}}]
  sequence_length: 32
  preprocessing_num_workers: 1
  cache_directory: {cache}
training: {{max_steps: 100, micro_batch_size: 2, global_batch_size: 12, precision: fp32, learning_rate: 3.0e-3}}
checkpoint: {{save_steps: 10}}
logging: {{logging_steps: 1, tensorboard: false}}
fault_tolerance: {{resize_interval_seconds: 1, preflight: false, restart_delay_seconds: 0.1}}
export: {{at_end: false}}
"""
ELASTIC = "name: lab\nbackend: ray\nnodes: {min: 2, max: 3}\nworkers_per_node: 1\ndevice: cpu\n"
ONE = "name: one\nbackend: ray\nnodes: 1\nworkers_per_node: 1\ndevice: cpu\n"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(stdlib=sysconfig.get_path("stdlib"), cache=tmp_path / "cache"))
    return path


def test_the_sizes_are_those_that_keep_the_global_batch(recipe: Path, tmp_path: Path) -> None:
    directory = RunDirectory.at(tmp_path / "run")
    directory.create()
    plan = make_plan(read_recipe(str(recipe), ()).recipe, Resources(nodes=6, workers_per_node=1, min_nodes=2))
    elastic = Elastic(plan, directory)
    assert [elastic.largest(available) for available in range(8)] == [None, None, 2, 3, 4, 4, 6, 6]
    small = elastic.write(4)
    assert (small.batch.global_batch_size, small.layout.data_parallel_size) == (12, 4)
    assert Plan.model_validate_json(directory.plan.read_text()) == small
    assert Plan.model_validate_json(directory.full_plan.read_text()) == plan
    elastic.write(6)
    assert Plan.model_validate_json(directory.plan.read_text()) == plan
    assert not directory.full_plan.exists()


@pytest.fixture
def lab() -> Iterator[tuple[Network, NetworkRay]]:
    health = {
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "5",
    }
    with (
        tempfile.TemporaryDirectory(prefix="zfnet-") as name,
        ExitStack() as stack,
    ):
        network = stack.enter_context(Network(Path(name), 3))
        environment = {machine.name: health for machine in network.machines}
        with unmeasured():
            ray = stack.enter_context(NetworkRay(network, 1, environment, dashboard=False))
        yield network, ray


@pytest.mark.ray
@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(missing()), reason=f"hardware: machines need {', '.join(missing())}")
def test_a_node_dies_and_returns(lab: tuple[Network, NetworkRay], recipe: Path, tmp_path: Path) -> None:
    network, ray = lab
    environment = {**os.environ, **ray.environment, "RAY_ADDRESS": ray.address, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])

    def start(profile: str, name: str) -> subprocess.Popen[str]:
        (tmp_path / f"{name}.yaml").write_text(profile)
        command = [sys.executable, "-m", "launcher.cli.main", "run", str(recipe), "--run-dir", str(tmp_path / name)]
        first = network.machines[0].command(*command, "--profile", str(tmp_path / f"{name}.yaml"), "--json")
        pipe = subprocess.PIPE
        return subprocess.Popen(first, env=environment, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True)

    # So slow that the node is back long before the end; not any more when it is.
    faults = tmp_path / "faults.json"
    slow = {"fault": "slow", "point": "phase.data", "rank": 0, "step": None, "seconds": 0.5}
    faults.write_text(json.dumps([slow]))
    environment[SWITCH] = str(faults)
    directory = RunDirectory.at(tmp_path / "run")
    process = start(ELASTIC, "run")
    try:
        wait_for_step(directory, 12)
        network.power_off(network.machines[2])

        def resized(count: int) -> bool:
            assert process.poll() is None, process.communicate()
            events = read_json_lines(directory.events)
            return sum(event["state"] == "resizing" for event in events) == count

        wait_for(lambda: resized(1), "smaller size", timeout=120)
        network.power_on(network.machines[2])
        ray.restart(network.machines[2])
        wait_for(lambda: resized(2), "larger size", timeout=120)
        faults.with_suffix(".new").write_text("[]")
        faults.with_suffix(".new").replace(faults)
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert json.loads(out)["status"] == "complete"
    running = [event for event in read_json_lines(directory.events) if event["state"] == "running"]
    assert [len(event["workers"]) for event in running] == [3, 2, 3], err
    assert not directory.full_plan.exists()
    account = read_account(directory)
    assert sum(account.seconds.values()) == pytest.approx(account.wall, rel=0.01)

    fixed = start(ONE, "fixed")
    _, err = fixed.communicate(timeout=200)
    assert fixed.returncode == 0, err
    records, expected = (read_json_lines(RunDirectory.at(tmp_path / name).metrics) for name in ("run", "fixed"))
    assert [record["step"] for record in records] == list(range(1, 101))
    assert [record["consumed_samples"] for record in records] == [12 * step for step in range(1, 101)]
    for record, other in zip(records, expected, strict=True):
        assert record["loss"] == pytest.approx(other["loss"], abs=1e-5)
