"""A Ray cluster of one node on this machine, started by us and ended by pid."""

import ctypes
import math
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.errors import ExpectedError

LOOPBACK = "127.0.1.1"
"""Not 127.0.0.1: Ray replaces that one by the machine's outside address, on which it then listens."""

OBJECT_STORE_BYTES = 128 * 2**20
"""Heartbeats are all that crosses Ray; the least that Ray takes without complaint is 75 MiB."""

STOP_GRACE_S = 1.0
"""Between SIGTERM and SIGKILL. Ray's own processes have nothing to save, and its raylet takes many seconds to drain."""


@dataclass(frozen=True)
class LocalRay:
    """A running (or just starting) Ray head.

    Attributes:
        address: `host:port` of its GCS, for RAY_ADDRESS.
        environment: what a process needs to join it, RAY_ADDRESS and the token included.
        log: output of `ray start`.
    """

    address: str
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes]

    def check_alive(self) -> None:
        """Raise if the head has ended.

        Raises:
            ExpectedError: with the end of what `ray start` wrote.
        """
        if self.process.poll() is not None:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise ExpectedError(f"the local Ray head ended with code {self.process.returncode}:\n{tail}")


@contextmanager
def local_ray(num_cpus: float, num_gpus: int = 0) -> Iterator[LocalRay]:
    """Start a Ray head on loopback, without dashboard and with token authentication; end it on leaving.

    Returns at once: the head needs a few seconds more, in which the caller can do other work.

    Args:
        num_cpus: CPUs that Ray hands out.
        num_gpus: GPUs that Ray hands out.
    """
    # Ray puts Unix sockets below this folder; their paths may have 107 bytes, so it must be short.
    temporary = Path(tempfile.mkdtemp(prefix="zf-"))
    port = free_port()
    environment = {
        "RAY_ADDRESS": f"{LOOPBACK}:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
    }
    log = temporary / "ray-start.log"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--node-ip-address={LOOPBACK}", f"--port={port}", "--include-dashboard=false", f"--temp-dir={temporary}"),
        # No autoscaler and no log forwarding: nothing here uses them. Ray's client server cannot be turned off.
        *("--no-monitor", "--include-log-monitor=false", f"--ray-client-server-port={free_port()}"),
        *(f"--num-cpus={math.ceil(num_cpus)}", f"--num-gpus={num_gpus}", f"--object-store-memory={OBJECT_STORE_BYTES}"),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in the terminal is for the driver, which saves first
            preexec_fn=_end_with_parent,
        )
    try:
        yield LocalRay(environment["RAY_ADDRESS"], environment, log, process)
    finally:
        end_tree(process)
        shutil.rmtree(temporary, ignore_errors=True)


def free_port() -> int:
    """A TCP port on loopback that is free now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """Have the kernel send SIGTERM to this child when the process that started it dies, however it dies."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def end_tree(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything it started, by pid: SIGTERM, then SIGKILL for what is left."""
    try:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    for member in tree:
        _signal(member, signal.SIGTERM)
    _, alive = psutil.wait_procs(tree, timeout=STOP_GRACE_S)
    for member in alive:
        _signal(member, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=10)
    process.wait(timeout=10)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
