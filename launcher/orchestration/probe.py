"""What a node says of itself, and how its connection to another node is measured; runs on the node."""

import hashlib
import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("torch", "deepspeed", "ray", "transformers", "numpy")
OF_CUDA = re.compile(r"nvidia-(nccl|cuda-runtime)(-cu\d+)?")
"""Packages with the libraries that torch's wheels for CUDA use."""
XID = re.compile(r"NVRM: Xid \((?:PCI:)?([0-9a-fA-F:.]+)\): (\d+)")
"""What the driver writes into the kernel's log when a GPU has an error (NVIDIA, "XID Errors")."""
CONNECT_TIMEOUT_S = 5.0
PING_COUNT = 20
MIN_STREAM_S = 0.3
"""The stream grows until it takes so long, or reaches its largest size."""
FIRST_BYTES, MAX_BYTES = 1 << 20, 1 << 30
_NUMBER = struct.Struct("!Q")


class NodeProbe:
    """An actor on one node."""

    def __init__(self) -> None:
        self._server = socket.create_server(("", 0), backlog=64)
        threading.Thread(target=self._serve, daemon=True).start()

    def facts(self, run_directory: str) -> dict[str, Any]:
        """Versions, devices, space and time of this node.

        Args:
            run_directory: whose disk is looked at, or the nearest folder above it that exists.
        """
        memory = psutil.virtual_memory()
        hostname = socket.gethostname()
        found = gpus()
        return {
            "hostname": hostname,
            "port": self._server.getsockname()[1],
            "versions": {
                "python": platform.python_version(),
                **{name: _version(name) for name in PACKAGES},
                **_cuda_versions(),
                **({"the NVIDIA driver": found[0]["driver_version"]} if found else {}),
                "zerofleet's code": code_hash(Path(__file__).parents[1], Path(__file__).parents[2] / "cluster"),
            },
            "resolves": _resolves(hostname),
            "cpus": os.cpu_count(),
            "memory_available": memory.available,
            "memory_total": memory.total,
            "temporary_free": _free(tempfile.gettempdir()),
            "run_free": _free(run_directory),
            "gpus": found,
            "xids": xids(_kernel_log()) if found else {},
        }

    def clock(self) -> float:
        """Unix time here."""
        return time.time()

    def read(self, path: str) -> str | None:
        """What is in a file; None when there is none."""
        try:
            return Path(path).read_text()
        except OSError:
            return None

    def measure(self, address: str, port: int) -> dict[str, Any]:
        """Latency and bandwidth of a TCP stream from this node to another one's probe.

        Returns:
            `latency_s` (half of the median round trip) and `bytes_per_second`, or `error`.
        """
        try:
            with socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S) as link:
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                trips = sorted(_send(link, 0) for _ in range(PING_COUNT))
                size, seconds = FIRST_BYTES, _send(link, FIRST_BYTES)
                while seconds < MIN_STREAM_S and size < MAX_BYTES:
                    size = min(MAX_BYTES, max(2 * size, int(size * MIN_STREAM_S / max(seconds, 1e-4))))
                    seconds = _send(link, size)
        except OSError as error:
            return {"error": str(error)}
        return {"latency_s": trips[len(trips) // 2] / 2, "bytes_per_second": size / seconds}

    def _serve(self) -> None:
        while True:
            link, _ = self._server.accept()
            threading.Thread(target=_answer, args=(link,), daemon=True).start()


def _send(link: socket.socket, size: int) -> float:
    """Send so many bytes and wait for the answer; returns the seconds."""
    chunk = memoryview(bytes(min(size, 1 << 20)))
    began = time.perf_counter()
    link.sendall(_NUMBER.pack(size))
    left = size
    while left:
        left -= link.send(chunk[:left])
    if not link.recv(1):
        raise ConnectionError("the other node hung up")
    return time.perf_counter() - began


def _answer(link: socket.socket) -> None:
    buffer = bytearray(1 << 20)
    with link:
        while True:
            head = link.recv(_NUMBER.size, socket.MSG_WAITALL)
            if len(head) < _NUMBER.size:
                return
            (left,) = _NUMBER.unpack(head)
            while left:
                got = link.recv_into(buffer, min(left, len(buffer)))
                if not got:
                    return
                left -= got
            link.sendall(b"!")


def code_hash(*folders: Path) -> str:
    """Short hash of the Python files in some folders, names and contents."""
    digest = hashlib.blake2b(digest_size=6)
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            digest.update(str(path.relative_to(folder)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _cuda_versions() -> dict[str, str]:
    names = {str(found.metadata["Name"]): found.version for found in distributions()}
    return {name: number for name, number in sorted(names.items()) if OF_CUDA.fullmatch(name)}


def xids(log: str) -> dict[str, list[int]]:
    """Numbers of the errors that a kernel's log has of each GPU, by its place on the bus."""
    found: dict[str, list[int]] = {}
    for place, number in XID.findall(log):
        found.setdefault(place, []).append(int(number))
    return {place: sorted(set(numbers)) for place, numbers in found.items()}


def _kernel_log() -> str:
    """Empty where it may not be read."""
    try:
        return subprocess.run(["dmesg"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _resolves(hostname: str) -> bool:
    try:
        socket.getaddrinfo(hostname, None)
    except OSError:
        return False
    return True


def _free(folder: str) -> int:
    """Bytes free where a folder is or will be."""
    path = Path(folder).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gpus() -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU; empty without one."""
    fields = ("index", "name", "driver_version", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [dict(zip(fields, [cell.strip() for cell in line.split(",")], strict=False)) for line in lines]
