"""The doctor on a real Ray cluster of four machines (network namespaces), each of which has something else wrong."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.network import Network, missing
from tests.support.ray_cluster import NetworkRay
from tests.support.unmeasured import unmeasured

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(bool(missing()), reason=f"hardware: machines need {', '.join(missing())}"),
]

PROFILE = "name: lab\nbackend: ray\nnodes: 4\nworkers_per_node: 1\ndevice: cpu\n"


class Lab:
    """Four machines with Ray; n2 has another deepspeed than the others."""

    def __init__(self, network: Network, ray: NetworkRay, folder: Path) -> None:
        self.network, self.ray, self.folder = network, ray, folder
        (folder / "lab.yaml").write_text(PROFILE)

    def doctor(self, run_directory: Path) -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "launcher.cli.main", "doctor", "--profile", str(self.folder / "lab.yaml")]
        command += ["--run-dir", str(run_directory), "--json"]
        environment = {**os.environ, **self.ray.environment, "RAY_ADDRESS": self.ray.address}
        environment["XDG_STATE_HOME"] = str(self.folder / "state")
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        first = self.network.machines[0].command(*command)
        done = subprocess.run(first, env=environment, capture_output=True, text=True, timeout=200)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="zfnet-") as name:  # a short name: Ray's sockets lie below it
        folder = Path(name)
        with made(folder) as lab:
            yield lab


@contextmanager
def made(folder: Path) -> Iterator[Lab]:
    other = folder / "other" / "deepspeed-0.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.1\n")
    here = str(Path(__file__).parents[2])
    environment = {name: {"PYTHONPATH": here} for name in ("n1", "n3", "n4")}
    environment["n2"] = {"PYTHONPATH": f"{folder / 'other'}{os.pathsep}{here}"}
    with ExitStack() as stack:
        network = stack.enter_context(Network(folder, 4))
        with unmeasured():
            ray = stack.enter_context(NetworkRay(network, 1, environment, dashboard=False))
        yield Lab(network, ray, folder)


def switch(network: Network, *command: str) -> None:
    subprocess.run(["ip", "netns", "exec", f"{network._tag}sw", *command], check=True)


def test_what_is_wrong_is_found_and_named(lab: Lab, tmp_path: Path) -> None:
    for direction in ("add", "del"):  # n3 is slow, n4 reaches nobody but the head
        if direction == "add":
            shape = ("root", "tbf", "rate", "40mbit", "burst", "64kb", "latency", "200ms")
            switch(lab.network, "tc", "qdisc", "add", "dev", "pn3", *shape)
            for address in ("10.77.0.12", "10.77.0.13"):
                fourth = lab.network.machines[3].command("ip", "route", "add", "blackhole", f"{address}/32")
                subprocess.run(fourth, check=True)
            code, found = lab.doctor(Path("/dev/shm/runs"))  # each machine has a /dev/shm of its own
            assert code == 2
        else:
            switch(lab.network, "tc", "qdisc", "del", "dev", "pn3", "root")
            for address in ("10.77.0.12", "10.77.0.13"):
                fourth = lab.network.machines[3].command("ip", "route", "del", "blackhole", f"{address}/32")
                subprocess.run(fourth, check=True)
            code, healed = lab.doctor(tmp_path)
    by_node: dict[str, list[str]] = {}
    for finding in found["findings"]:
        by_node.setdefault(finding["node"], []).append(finding["text"])
    assert any("deepspeed is 0.1, and " in text for text in by_node["n2"])
    assert any("slow network" in text for text in by_node["n3"])
    assert any("slow in an all-reduce" in text for text in by_node["n3"])
    assert any("no connection with n2, n3" in text for text in by_node["n4"])
    unshared = {node for node, texts in by_node.items() if any("does not see what" in text for text in texts)}
    assert unshared == {"n2", "n3", "n4"}, "everyone but the writer"
    assert not any("deepspeed" in text or "slow" in text for name in ("n1", "n4") for text in by_node.get(name, []))
    assert code == 2
    errors = [finding for finding in healed["findings"] if finding["level"] == "error"]
    assert [(finding["node"], finding["text"][:16]) for finding in errors] == [("n2", "deepspeed is 0.1")]
    assert len(healed["links"]) == 6
    assert all(link["bytes_per_second"] > 0 for link in healed["links"])
    assert found["all_reduces"][0]["nodes"] == ["n1", "n2", "n3"], "n4 is left out: it reaches nobody"
    groups = [group["nodes"] for group in healed["all_reduces"]]
    assert groups[:3] == [["n1", "n2", "n3", "n4"], ["n1", "n2"], ["n3", "n4"]]
    assert healed["all_reduce"]["bytes_per_second"] > found["all_reduce"]["bytes_per_second"] > 0
