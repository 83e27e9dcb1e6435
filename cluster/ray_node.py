"""One Ray node: `ray start --block` as our child, with its own folder and ports, ended by pid.

Never `ray stop`: it ends every Ray of the user on the machine, other jobs' too.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import ExpectedError
from cluster.processes import end_tree, prepare_child
from cluster.types import DEFAULT_NODE_TIMEOUT_S, NODE_TIMEOUT_VARIABLE

OBJECT_STORE_BYTES = 128 * 2**20
"""Heartbeats are all that crosses Ray; the least that Ray takes without complaint is 75 MiB."""

MAX_TEMPORARY_LENGTH = 40
"""Of the folder of Ray's Unix sockets: their whole paths may have 107 bytes (unix(7)), and Ray appends about 64."""

PORT_OPTIONS = (
    "node-manager-port",
    "object-manager-port",
    "runtime-env-agent-port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "metrics-export-port",
)
HEAD_PORT_OPTIONS = ("port", "ray-client-server-port", "dashboard-port")
_METRIC_PORTS = ("DASHBOARD_METRIC_PORT", "AUTOSCALER_METRIC_PORT")
"""Two more of the head, which only the environment can set; left alone, two heads on a machine want the same ones."""

PORTS_PER_NODE = len(PORT_OPTIONS) + len(HEAD_PORT_OPTIONS) + len(_METRIC_PORTS)
PORT_RANGE = range(20_000, 32_000)
"""Below Linux' range for outgoing connections (32768 and up), above what daemons usually take."""

HEALTH_CHECKS = 5
"""So many health checks in a row a node must miss before it is given up."""

RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",  # said outright: ray start guesses differently for head and workers
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    # How long a node without its head goes on; Ray's default is a minute.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
    # Ray runs workers at nice 15, behind everything else on the machine; training is what the machine is for.
    "RAY_worker_niceness": "0",
    # Nobody reads Ray's own statistics of the clusters that we start; gathering them takes time from training.
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_event_stats": "0",
    "RAY_memory_monitor_refresh_ms": "1000",
}
"""Variables of every process of the clusters that we start: our choice of Ray's settings."""

_STARTED = b"Ray runtime started"


class RayStartError(ExpectedError):
    """`ray start` ended before its node was up, or no ports are free."""


@dataclass(frozen=True)
class NodeResources:
    """What Ray may hand out on one node.

    Attributes:
        cpus: cores.
        gpus: GPUs; 0 hides them from Ray.
        memory: bytes; None: what Ray finds.
    """

    cpus: float
    gpus: int = 0
    memory: int | None = None


@dataclass(frozen=True)
class RaySecrets:
    """What every process of one Ray cluster shares; kept out of every command line.

    Attributes:
        token: of Ray's token authentication.
        node_timeout_s: how long a node that dies or is cut off may stay unnoticed.
    """

    token: str
    node_timeout_s: float = DEFAULT_NODE_TIMEOUT_S

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every process that joins the cluster, our choice of Ray's settings included."""
        return {
            **RAY_SETTINGS,
            **health_checks(self.node_timeout_s),
            NODE_TIMEOUT_VARIABLE: f"{self.node_timeout_s:g}",
            "RAY_AUTH_TOKEN": self.token,
        }


def health_checks(bound_s: float) -> dict[str, str]:
    """Ray's settings with which a node that dies or is cut off is given up within a bound; its own take up to a minute.

    Each of the checks waits for its answer, and a third of its time for the next check.
    """
    each_ms = bound_s * 1000 / HEALTH_CHECKS
    return {
        "RAY_health_check_initial_delay_ms": "0",
        "RAY_health_check_period_ms": str(int(each_ms / 3)),
        "RAY_health_check_timeout_ms": str(int(each_ms * 2 / 3)),
        "RAY_health_check_failure_threshold": str(HEALTH_CHECKS),
    }


def port_block(key: str, address: str, skip: int = 0) -> tuple[int, ...]:
    """Ports for one node, derived from a key so that jobs on one machine get different ones, and free at the moment.

    Args:
        key: names the job and the node.
        address: where they must be free.
        skip: blocks to leave out, after a node failed on the first ones.

    Raises:
        RayStartError: no block is free.
    """
    blocks = len(PORT_RANGE) // PORTS_PER_NODE
    first = zlib.crc32(key.encode()) % blocks
    for offset in range(skip, blocks):
        start = PORT_RANGE.start + (first + offset) % blocks * PORTS_PER_NODE
        ports = tuple(range(start, start + PORTS_PER_NODE))
        if _all_free(ports, address):
            return ports
    raise RayStartError(f"no {PORTS_PER_NODE} neighbouring ports from {PORT_RANGE.start} to {PORT_RANGE.stop} are free")


def _all_free(ports: tuple[int, ...], address: str) -> bool:
    with ExitStack() as stack:
        for port in ports:
            probe = stack.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                return False
    return True


class RayNode:
    """A Ray node that was started here."""

    def __init__(
        self, command: list[str], environment: dict[str, str], temporary: Path, log: Path, *, waits: bool = False
    ) -> None:
        self.temporary = temporary
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE if waits else subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal is for the driver, which saves first
                preexec_fn=prepare_child,
            )

    def join(self, head_address: str, secrets: RaySecrets) -> None:
        """Have a node that `prepare_worker` started join the cluster at `head_address`; `is_up` tells when it has."""
        order = {"options": [f"--address={head_address}"], "environment": secrets.environment}
        assert self.process.stdin is not None  # noqa: S101 - of prepare_worker's nodes
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stream:  # check_alive says why it has ended
            stream.write(json.dumps(order).encode() + b"\n")

    @property
    def is_up(self) -> bool:
        """Whether the node has joined its cluster."""
        return _STARTED in self.log.read_bytes()

    def check_alive(self) -> None:
        """Raise if the node has ended.

        Raises:
            RayStartError: with the end of what `ray start` wrote.
        """
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise RayStartError(f"ray start ended with code {self.process.returncode}:\n{tail}")

    def end(self, keep_logs_in: Path | None = None) -> None:
        """End every process of the node and remove its folder.

        Args:
            keep_logs_in: folder for Ray's own logs, when someone will have to read them.
        """
        end_tree(self.process)
        if keep_logs_in is not None:
            for path in self.temporary.glob("session_*-*/logs/*"):
                if path.is_file() and path.stat().st_size:
                    keep_logs_in.mkdir(parents=True, exist_ok=True)
                    shutil.copy(path, keep_logs_in / path.name)
        shutil.rmtree(self.temporary, ignore_errors=True)


def start_head(
    address: str,
    ports: tuple[int, ...],
    resources: NodeResources,
    secrets: RaySecrets,
    *,
    dashboard: bool = False,
    log: Path | None = None,
) -> tuple[str, RayNode]:
    """Start a cluster's first node; returns at once, while the node needs some seconds more.

    Args:
        address: of this machine, as other nodes see it.
        ports: from `port_block`.
        resources: what Ray may hand out here.
        secrets: of the cluster.
        dashboard: serve Ray's dashboard on loopback.
        log: where output goes; default: into the node's folder.

    Returns:
        The cluster's address for RAY_ADDRESS, and the node.
    """
    named = dict(zip((*HEAD_PORT_OPTIONS, *PORT_OPTIONS), ports, strict=False))
    options = [
        "--head",
        f"--include-dashboard={'true' if dashboard else 'false'}",
        "--dashboard-host=127.0.0.1",
        "--no-monitor",  # no autoscaler: nothing here uses it; Ray's client server cannot be turned off
        *(f"--{name}={port}" for name, port in named.items()),
    ]
    metric_ports = {name: str(port) for name, port in zip(_METRIC_PORTS, ports[len(named) :], strict=True)}
    return f"{address}:{named['port']}", _start(
        options, address, resources, {**secrets.environment, **metric_ports}, log
    )


def prepare_worker(
    address: str, ports: tuple[int, ...], resources: NodeResources, *, log: Path | None = None
) -> RayNode:
    """Start a node up to where it needs a cluster; `RayNode.join` names one. See `start_head`."""
    options = [f"--{name}={port}" for name, port in zip(PORT_OPTIONS, ports, strict=False)]
    return _start(options, address, resources, RAY_SETTINGS, log, waits=True)


def start_worker(
    head_address: str, address: str, ports: tuple[int, ...], resources: NodeResources, secrets: RaySecrets
) -> RayNode:
    """Start a node that joins the cluster at `head_address`; see `start_head`."""
    node = prepare_worker(address, ports, resources)
    node.join(head_address, secrets)
    return node


def _start(
    options: list[str],
    address: str,
    resources: NodeResources,
    settings: dict[str, str],
    log: Path | None,
    *,
    waits: bool = False,
) -> RayNode:
    temporary = temporary_folder()
    start = ("-P", "-m", "cluster.waiting_ray") if waits else ("-m", "ray.scripts.scripts", "start")
    command = [
        *(sys.executable, *start, "--block", "--disable-usage-stats"),
        *(f"--node-ip-address={address}", f"--temp-dir={temporary}"),
        *(f"--num-cpus={math.ceil(resources.cpus)}", f"--num-gpus={resources.gpus}"),
        f"--object-store-memory={OBJECT_STORE_BYTES}",
        *([] if resources.memory is None else [f"--memory={resources.memory}"]),
        "--include-log-monitor=false",  # no log forwarding: ranks write their own logs
        *("--min-worker-port=0", "--max-worker-port=0"),  # any free ones: Ray's fixed range is every job's
        *options,
    ]
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}  # another cluster's
    return RayNode(command, {**inherited, **settings}, temporary, log or temporary / "ray-start.log", waits=waits)


def temporary_folder() -> Path:
    """A new folder on this machine, with a path short enough for Ray's sockets."""
    parent = tempfile.gettempdir()
    if len(parent) > MAX_TEMPORARY_LENGTH - len("/zf-12345678"):
        parent = "/tmp"  # noqa: S108 - mkdtemp makes a folder of our own in it
    return Path(tempfile.mkdtemp(prefix="zf-", dir=parent))


def accepts_connections(address: str, timeout_s: float = 1.0) -> bool:
    """Whether something listens at `HOST:PORT`."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except OSError:
        return False
    return True
