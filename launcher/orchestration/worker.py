"""One training process: a Ray actor that trains in a thread and answers polls meanwhile.

torch is imported in the training thread only, after the environment is set.
"""

import contextlib
import errno
import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any

from launcher.checkpoints.memory import HostMemory
from launcher.errors import ExpectedError
from launcher.run_directory import ATTEMPT_MARK, RunDirectory
from launcher.training.context import Beat, Heartbeat, Phase, WorkerContext

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # as torchrun does: N processes with one thread pool a core each would fight
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
MIN_SPARE_MEMORY = 4 * 2**30
"""A node with less free memory keeps no spare worker; one has about half a GiB, its imports."""


@dataclass(frozen=True)
class Placement:
    """Where a rank is, and how it finds the others.

    Attributes:
        rank: 0 to world_size - 1, node by node.
        local_rank: index among the ranks of its node.
        local_world_size: ranks on its node.
        node_rank: index of its node.
        world_size: number of ranks.
        master_address: host of rank 0.
        master_port: free port there.
        visible_devices: GPU ids of all ranks of its node, comma separated; empty on CPU.
    """

    rank: int
    local_rank: int
    local_world_size: int
    node_rank: int
    world_size: int
    master_address: str
    master_port: int
    visible_devices: str = ""

    def environment(self, device: str) -> dict[str, str]:
        """What torchrun would set."""
        values = {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "LOCAL_SIZE": str(self.local_world_size),
            "GROUP_RANK": str(self.node_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
            "DS_ACCELERATOR": device,
        }
        if device == "cuda":
            values["CUDA_VISIBLE_DEVICES"] = self.visible_devices
        return values


class Worker:
    """Actor of one rank, or of none yet: a spare that is warmed up and waits."""

    def __init__(self, run_directory: str) -> None:
        self.run_directory = RunDirectory.at(run_directory)
        self.rank = -1
        self.heartbeat = Heartbeat(-1)
        self.stop_event = threading.Event()
        self._ended = threading.Event()
        self._outcome: dict[str, Any] = {}

    def warm_up(self, device: str, environment: dict[str, str]) -> None:
        """Import what training imports, and wait; for a spare.

        Raises:
            MemoryError: this node has too little memory for spares.
        """
        import psutil

        available = psutil.virtual_memory().available
        if available < MIN_SPARE_MEMORY:
            raise MemoryError(f"{available / 2**30:.1f} GiB are free, too little for a spare worker")
        _write_output_to(self.run_directory.logs / f"spare_{socket.gethostname()}_{os.getpid()}.log")
        _set_environment(device, environment)
        import deepspeed  # noqa: F401 - imported before it is needed

        import launcher.training.entry  # noqa: F401 - imported before it is needed

        sys.stdout.write("warm\n")

    def join(self, rank: int) -> dict[str, Any]:
        """Become a rank; returns node address, GPU ids, process id and a free port."""
        import ray

        self.rank = rank
        self.heartbeat = Heartbeat(rank)
        _write_output_to(self.run_directory.rank_log(rank))
        sys.stdout.write(f"{ATTEMPT_MARK} {time.strftime('%F %T')} on {socket.gethostname()}, process {os.getpid()}\n")

        context = ray.get_runtime_context()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return {
            "node_id": context.get_node_id(),
            "address": ray.util.get_node_ip_address(),
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "port": port,
            "gpu_ids": [str(gpu) for gpu in context.get_accelerator_ids().get("GPU", [])],
        }

    def start(
        self, placement: Placement, device: str, environment: dict[str, str], memory: HostMemory | None = None
    ) -> None:
        """Begin training in a thread."""
        _set_environment(device, environment)
        os.environ.update(placement.environment(device))
        threading.Thread(target=self._train, args=(placement, memory), name="training", daemon=True).start()

    def poll(self) -> Beat:
        """What this rank is doing."""
        return self.heartbeat.read()

    def wait(self) -> dict[str, Any]:
        """Return when training has ended, with the result or the error, and the last heartbeat."""
        self._ended.wait()
        return {**self._outcome, "beat": self.heartbeat.read()}

    def request_stop(self) -> None:
        """Save and end at the next step boundary."""
        self.stop_event.set()

    def _train(self, placement: Placement, memory: HostMemory | None) -> None:
        try:
            self.heartbeat.enter(Phase.IMPORT)
            from launcher.training.entry import run_rank

            context = WorkerContext(
                self.run_directory,
                placement.rank,
                placement.world_size,
                placement.local_rank,
                self.heartbeat,
                self.stop_event,
                memory,
            )
            self._outcome = {"result": asdict(run_rank(context))}
        except BaseException as error:
            self._outcome = {"error": self._report(error)}
        finally:
            self._ended.set()

    def _report(self, error: BaseException) -> dict[str, Any]:
        """The facts of a `Failure`, and the traceback in this rank's log."""
        text = "".join(traceback.format_exception(error))
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
        expected = isinstance(error, ExpectedError) or full
        with contextlib.suppress(OSError):  # the disk that the log is on may be the very one that is full
            sys.stderr.write(text)
            sys.stderr.flush()
        return {
            "rank": self.rank,
            "kind": "expected" if expected else "exception",
            "message": str(error) if expected else f"{type(error).__name__}: {error}",
            "traceback": "" if expected else text,
            "step": self.heartbeat.step,
            "phase": self.heartbeat.read().phase.value,
            "time": time.time(),
            "exception": type(error).__name__,
        }


def _set_environment(device: str, environment: dict[str, str]) -> None:
    """What must stand in the environment before torch and DeepSpeed are imported."""
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", WORKER_ENVIRONMENT["OMP_NUM_THREADS"])
    os.environ["DS_ACCELERATOR"] = device
    os.environ.update(environment)
    if device == "cpu":
        # See upstream.avoid_compiler_import, which cannot be imported before torch may be.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")


def _write_output_to(path: os.PathLike[str]) -> None:
    """Send this process's output, C++ libraries' included, to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
