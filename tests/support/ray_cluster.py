"""A real Ray cluster of several nodes, with the dashboard that the Jobs API needs and token authentication.

On the machines of a `Network`, or, lighter and without root, as several Ray nodes on this one.
"""

import os
import secrets
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cluster.ray_node import (
    NodeResources,
    RayNode,
    RaySecrets,
    accepts_connections,
    port_block,
    start_head,
    start_worker,
)
from tests.support.network import Machine, Network

GCS_PORT, DASHBOARD_PORT = 6379, 8265
NO_DASHBOARD = ("--include-dashboard=false",)
START_TIMEOUT_S = 90
ATTEMPTS = 3
"""To join: on a machine with much else to do, a node may not hear from its head in the time that Ray gives it."""


@dataclass
class NetworkRay:
    """Ray on the machines of a network, started as a person would start it.

    Attributes:
        network: the machines.
        cpus: that each hands out.
        environment_of: more environment of a machine's Ray, by its name.
        dashboard: whether the first serves one, and with it the Jobs API.
        head_cpus: that the first hands out, if not as many.
    """

    network: Network
    cpus: int = 2
    environment_of: dict[str, dict[str, str]] = field(default_factory=dict)
    dashboard: bool = True
    head_cpus: int | None = None
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    _processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{self.network.machines[0].address}:{GCS_PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """Of whoever speaks to the cluster."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_USAGE_STATS_ENABLED": "0"}

    def __enter__(self) -> "NetworkRay":
        first, *others = self.network.machines
        dashboard = ("--dashboard-host=0.0.0.0", f"--dashboard-port={DASHBOARD_PORT}")
        self._start(first, "--head", f"--port={GCS_PORT}", *(dashboard if self.dashboard else NO_DASHBOARD))
        self._await(first)
        for machine in others:
            self._start(machine, f"--address={self.address}")
        for machine in others:
            self._await(machine, ATTEMPTS - 1)
        return self

    def restart(self, machine: Machine) -> None:
        """Start Ray again on a machine that was off; returns when it has joined."""
        self._start(machine, f"--address={self.address}")
        self._await(machine, ATTEMPTS - 1)

    def processes_of(self, machine: Machine) -> list[psutil.Process]:
        """All that its `ray start` has started."""
        return psutil.Process(self._processes[machine.name].pid).children(recursive=True)

    def await_end(self, machine: Machine) -> None:
        """Until Ray on a machine has ended by itself: it lost its node agent, or its cluster gave it up."""
        self._processes[machine.name].wait(START_TIMEOUT_S)

    def _start(self, machine: Machine, *options: str) -> None:
        head = self.head_cpus is not None and machine is self.network.machines[0]
        common = (
            f"--num-cpus={self.head_cpus if head else self.cpus}",
            "--object-store-memory=128000000",
            "--disable-usage-stats",
            "--block",
        )
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *common, *options]
        temporary = self.network.folder / f"ray-{machine.name}"
        with self._log(machine).open("wb") as log:
            self._processes[machine.name] = subprocess.Popen(
                machine.command(*command, f"--node-ip-address={machine.address}", f"--temp-dir={temporary}"),
                env={**os.environ, **self.environment, **self.environment_of.get(machine.name, {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _log(self, machine: Machine) -> Path:
        return self.network.folder / f"ray-{machine.name}.log"

    def _await(self, machine: Machine, retries: int = 0) -> None:
        """Wait for Ray on a machine. A node that waits too long for its head ends itself: start that one again."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while b"Ray runtime started" not in self._log(machine).read_bytes():
            ended = self._processes[machine.name].poll() is not None
            if ended and retries and time.monotonic() < deadline:
                retries -= 1
                self._start(machine, f"--address={self.address}")
            elif ended or time.monotonic() > deadline:
                raise RuntimeError(f"Ray did not start on {machine.name}:\n{self._log(machine).read_text()[-3000:]}")
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()  # nsenter; what it started dies with the machines
            process.wait(10)


@dataclass
class HostRay:
    """Several Ray nodes on this machine, each with a loopback address of its own; the first has a dashboard."""

    nodes: int = 2
    cpus: int = 2
    environment: dict[str, str] = field(default_factory=dict)
    url: str = ""
    started: list[RayNode] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "HostRay":
        cluster, resources = RaySecrets(secrets.token_hex(16)), NodeResources(self.cpus)
        key = f"tests/{os.getpid()}"
        ports = port_block(f"{key}/0", "127.0.1.1")
        address, head = start_head("127.0.1.1", ports, resources, cluster, dashboard=True)
        self._stack.callback(head.end)
        started = self.started
        started.append(head)
        self._await(lambda: accepts_connections(address), started)
        for index in range(1, self.nodes):
            own = f"127.0.1.{index + 1}"
            started.append(start_worker(address, own, port_block(f"{key}/{index}", own), resources, cluster))
            self._stack.callback(started[-1].end)
        self._await(lambda: all(node.is_up for node in started), started)
        self.environment = {**cluster.environment, "RAY_ADDRESS": address}
        self.url = f"http://127.0.0.1:{ports[2]}"
        return self

    def _await(self, condition, started: list[RayNode]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not condition():
            for node in started:
                node.check_alive()
            if time.monotonic() > deadline:
                raise RuntimeError("Ray did not start")
            time.sleep(0.1)

    def __exit__(self, *_: object) -> None:
        self._stack.close()
