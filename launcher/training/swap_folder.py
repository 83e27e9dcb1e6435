"""The folder on NVMe of one start of a run: checked before the engine is built, and removed when training ends."""

import errno
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.training.distributed import all_gather, broadcast

PREFIX = "zerofleet-"
_LOCK = "lock"
_OFFLOAD = ("zero_optimization", "offload_optimizer")
_FIELD = "zero.nvme_path"


class SwapFolder:
    """Every rank has one; the first rank of each node makes the folder of its node, and holds a lock in it.

    Files on NVMe outlive a rank that is killed. The kernel gives its lock back then, by which the next start in the
    same `zero.nvme_path`, of this run or another one, knows that the folder is nobody's.

    Args:
        plan: of the run, with the optimizer on NVMe.

    Raises:
        RecipeError: on every rank: a node has no such folder, or too little room, or cannot write there directly.
    """

    def __init__(self, plan: Plan) -> None:
        self.root = Path(offload_section(plan.deepspeed_config)["nvme_path"])
        token = broadcast(lambda: os.urandom(8).hex())
        self.path = self.root / f"{PREFIX}{token}-{socket.gethostname()}"
        self._lock: int | None = None
        problem = self._prepare(_needed(plan)) if int(os.environ.get("LOCAL_RANK", "0")) == 0 else None
        problems = sorted({text for text in all_gather(problem) if text is not None})
        if problems:
            self.close()
            raise RecipeError.single(_FIELD, "; ".join(problems))

    def config(self, deepspeed_config: Mapping[str, Any]) -> dict[str, Any]:
        """The same DeepSpeed config with this folder in the place of the one that all runs share."""
        zero = deepspeed_config["zero_optimization"]
        section = {**zero["offload_optimizer"], "nvme_path": str(self.path)}
        return {**deepspeed_config, "zero_optimization": {**zero, "offload_optimizer": section}}

    def _prepare(self, needed: int) -> str | None:
        """Make this node's folder, or say why not: an error on one rank would leave the others waiting."""
        try:
            problem = folder_problem(self.root)
            if problem is None:
                remove_abandoned(self.root)
                problem = room_problem(self.root, needed)
            if problem is None:
                self._make()
        except OSError as error:
            return f"{self.root} on {socket.gethostname()}: {error.strerror or error}"
        return problem

    def _make(self) -> None:
        """Make and lock the folder before it gets the name under which others look whether it is abandoned."""
        made = Path(tempfile.mkdtemp(prefix=f".{PREFIX}", dir=self.root))
        self._lock = os.open(made / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        made.rename(self.path)

    def close(self) -> None:
        """Remove the folder of this node; the engine makes no step afterwards."""
        if self._lock is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def offload_section(deepspeed_config: Mapping[str, Any]) -> dict[str, Any]:
    """What a resolved DeepSpeed config says of the offloaded optimizer."""
    section: dict[str, Any] = deepspeed_config["zero_optimization"].get("offload_optimizer") or {}
    return section


def open_swap_folder(plan: Plan) -> SwapFolder | None:
    """The folder of a start, on every rank; `None` for a plan with nothing on NVMe.

    Raises:
        RecipeError: as `SwapFolder`.
    """
    return SwapFolder(plan) if offload_section(plan.deepspeed_config).get("device") == "nvme" else None


def _needed(plan: Plan) -> int:
    """Bytes that this node's ranks will write; 0 where the plan does not know."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return here * max((rank.nvme_bytes for rank in plan.ranks or ()), default=0)


def folder_problem(root: Path) -> str | None:
    """Say why files cannot be made in a node's folder as DeepSpeed makes them; `None` when they can."""
    where = f"{root} on {socket.gethostname()}"
    if not root.exists():
        return f"there is no folder {where}; make it, or name one that each node has"
    if not root.is_dir():
        return f"{where} is not a directory; name a folder"
    probe = root / f".{PREFIX}probe-{os.getpid()}"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return None  # which `room_problem` tells with figures
        reason = error.strerror or str(error)
        return f"{where} cannot be written past the page cache (O_DIRECT: {reason}); name a folder on a local disk"
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


def room_problem(root: Path, needed: int) -> str | None:
    """Say that a node's disk is too small or too full for so many bytes; `None` when it has room."""
    usage = shutil.disk_usage(root)
    if usage.free and usage.free >= needed:
        return None
    return (
        f"{root} on {socket.gethostname()} has {_size(usage.free)} free of {_size(usage.total)}, and this node's ranks "
        f"write {_size(needed)} there; free some, or use more nodes, or set zero.offload_optimizer to cpu"
    )


def remove_abandoned(root: Path) -> None:
    """Remove the folders of starts that were killed: those whose lock nobody holds."""
    for folder in root.glob(f"{PREFIX}*"):
        with suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
