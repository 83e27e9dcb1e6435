"""A node's raylet is killed, its cable pulled, or the driver killed, while a worker is at each place, on real machines.

Four machines (namespaces): the first has the head and the driver, two of the others the workers, the last one waits. So
a run that loses a node goes on at once, and the node is back before the next one is lost.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from launcher.checkpoints.fault_plan import SWITCH
from launcher.run_directory import RunDirectory, read_json_lines
from tests.orchestration.conftest import records, wait_for
from tests.orchestration.fault_cells import (
    LENGTH,
    PLACES,
    SAVE_STEPS,
    SETTINGS,
    Cell,
    Moments,
    check_account,
    incidents,
    names,
    steps_made_again,
)
from tests.support.network import Machine, Network, missing
from tests.support.ray_cluster import NetworkRay
from tests.support.unmeasured import unmeasured

pytestmark = [
    pytest.mark.ray,
    pytest.mark.distributed,
    pytest.mark.skipif(bool(missing()), reason=f"hardware: machines need {', '.join(missing())}"),
]

CHAINS = [
    [Cell("raylet", "phase.forward", 1, 17), Cell("cable", "commit.gathered", 0)],
    *([Cell(fault, *place) for place in PLACES] for fault in ("raylet", "cable", "driver")),
]
HEALTH = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
}
"""As our own clusters have it (cluster/ray_node.py)."""


@dataclass
class Lab:
    """The machines and the command on the first of them."""

    network: Network
    ray: NetworkRay
    recipe: Path
    environment: dict[str, str]

    def start(self, directory: RunDirectory, profile: Path) -> subprocess.Popen[str]:
        """Start the run, or go on with it."""
        command = [sys.executable, "-m", "launcher.cli.main", "run", str(self.recipe), "--profile", str(profile)]
        command += ["--run-dir", str(directory.path), "--json", *SETTINGS, "preflight=false"]
        return subprocess.Popen(
            self.network.machines[0].command(*command),
            env={**os.environ, **self.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def machine_of(self, directory: RunDirectory, rank: int) -> Machine:
        """Where a rank of the newest attempt runs."""
        running = [event for event in read_json_lines(directory.events) if event["state"] == "running"]
        name = running[-1]["workers"][rank]["hostname"]
        return next(machine for machine in self.network.machines if machine.name == name)

    def kill_raylet(self, machine: Machine, noticed: Callable[[], bool]) -> None:
        """The node agent dies, and its workers with it; it is started again."""
        named = {process: name for process in self.ray.processes_of(machine) if (name := _name(process))}
        (raylet,) = [process for process, name in named.items() if name == "raylet"]
        raylet.send_signal(signal.SIGKILL)
        wait_for(noticed, "notice of a node without its raylet", timeout=90)
        self.ray.await_end(machine)
        self.ray.restart(machine)

    def pull_cable(self, machine: Machine, noticed: Callable[[], bool]) -> None:
        """The node cannot be reached for a while; what it missed ends it, and it is started again."""
        self.network.cut(machine)
        wait_for(noticed, "notice of a node that is cut off", timeout=120)
        self.network.heal(machine)
        self.ray.await_end(machine)
        self.ray.restart(machine)

    def workers(self) -> list[str]:
        """Training processes on all machines."""
        found = []
        for process in psutil.process_iter(["name", "cmdline"]):
            title = " ".join(process.info["cmdline"] or [])
            if title.startswith("ray::Worker") and _space(process.pid) in self._spaces():
                found.append(f"{process.pid} {title}")
        return found

    def _spaces(self) -> set[str]:
        return {_space(machine.first_process) for machine in self.network.machines}


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""  # it has ended


def _space(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return ""  # it has ended


@pytest.fixture
def lab(tiny_recipe: Path) -> Iterator[Lab]:
    with tempfile.TemporaryDirectory(prefix="zfnet-") as name, ExitStack() as stack:
        network = stack.enter_context(Network(Path(name), 4))
        health = {machine.name: HEALTH for machine in network.machines}
        with unmeasured():
            ray = stack.enter_context(NetworkRay(network, 1, health, dashboard=False, head_cpus=0))
        environment = {**ray.environment, "RAY_ADDRESS": ray.address, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(Path(__file__).parents[2])
        yield Lab(network, ray, tiny_recipe, environment)


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize("chain", CHAINS, ids=names)
def test_a_run_outlives_its_nodes(chain: list[Cell], lab: Lab, uninterrupted: RunDirectory, tmp_path: Path) -> None:
    moments = Moments.of(chain, tmp_path)
    lab.environment[SWITCH] = str(moments.plan)
    profile = tmp_path / "lab.yaml"
    profile.write_text("name: lab\nbackend: ray\nnodes: 2\nworkers_per_node: 1\ndevice: cpu\n")
    directory = RunDirectory.at(tmp_path / "run")
    process = lab.start(directory, profile)
    try:
        met: list[int] = []
        lost: list[str] = []
        while len(met) < len(chain):
            met.append(moments.next(met, timeout=120))
            cell = chain[met[-1]]
            if cell.fault == "driver":
                (driver,) = psutil.Process(process.pid).children()
                driver.kill()
                process.communicate()
                process = lab.start(directory, profile)
                continue
            machine = lab.machine_of(directory, cell.rank)
            lost.append(machine.name)
            act = lab.kill_raylet if cell.fault == "raylet" else lab.pull_cable
            act(machine, lambda: len(incidents(directory)) == len(lost))
        out, err = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert json.loads(out)["step"] == LENGTH, "and nothing but JSON, whatever Ray has to say"
    assert "(raylet)" not in err
    assert records(directory) == records(uninterrupted), "no sample lost or repeated, every loss the same"
    found = incidents(directory)
    assert [event["category"] for event in found] == ["infrastructure"] * len(lost)
    assert [event["node"] for event in found] == lost, "the node is named"
    states = [event["state"] for event in read_json_lines(directory.events)]
    assert states.count("interrupted") == sum(cell.fault == "driver" for cell in chain)
    assert max(steps_made_again(directory)) <= SAVE_STEPS, "at most one save interval is lost"
    check_account(directory)
    wait_for(lambda: not lab.workers(), "end of all workers")
