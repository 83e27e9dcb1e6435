"""What the clusters that we start are told about nodes that do not answer."""

import os
import subprocess
import sys

import psutil
import pytest

from cluster.local import local_ray
from cluster.ray_node import NodeResources, RaySecrets, health_checks
from cluster.types import NODE_TIMEOUT_VARIABLE
from tests.support.unmeasured import unmeasured

WATCH = """
import time
import ray
import ray._private.worker
ray.init(logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 2:
    time.sleep(0.1)
print("two", flush=True)
began = time.monotonic()
while sum(node["Alive"] for node in ray.nodes()) == 2:
    time.sleep(0.1)
print(f"{time.monotonic() - began:.1f}", flush=True)
"""


@pytest.mark.parametrize("bound", [3, 15, 60, 600])
def test_all_checks_together_take_no_longer_than_the_bound(bound: float) -> None:
    settings = {name: int(value) for name, value in health_checks(bound).items()}
    each = settings["RAY_health_check_period_ms"] + settings["RAY_health_check_timeout_ms"]
    assert 0.9 * bound * 1000 < settings["RAY_health_check_failure_threshold"] * each <= bound * 1000
    assert settings["RAY_health_check_initial_delay_ms"] == 0


def test_every_process_of_a_cluster_is_told() -> None:
    environment = RaySecrets("token", 6.0).environment
    assert health_checks(6.0).items() <= environment.items()
    assert environment[NODE_TIMEOUT_VARIABLE] == "6"


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_node_that_does_not_answer_is_given_up() -> None:
    with unmeasured(), local_ray(NodeResources(1), nodes=2, node_timeout_s=3) as ray:
        watcher = subprocess.Popen(
            [sys.executable, "-c", WATCH], env={**os.environ, **ray.environment}, stdout=subprocess.PIPE, text=True
        )
        try:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "two\n"
            head, other = (psutil.Process(node.process.pid) for node in ray.nodes)
            (gcs,) = (child for child in head.children(recursive=True) if child.name() == "gcs_server")
            assert health_checks(3).items() <= gcs.environ().items()
            (raylet,) = (child for child in other.children(recursive=True) if child.name() == "raylet")
            raylet.suspend()
            out, _ = watcher.communicate(timeout=100)
            sys.stdout.write(f"noticed after {out} s\n")  # how long it took is for a person to see: pytest -s
            assert out, "the watcher saw the node's end"
            raylet.resume()
        finally:
            watcher.kill()
            watcher.communicate()
