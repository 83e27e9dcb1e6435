"""What ranks do around optimizer states on NVMe; runs in their processes."""

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

import cases
import torch

from launcher.data.store import PreparedData
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.training.context import Phase
from launcher.training.loop import train
from launcher.training.swap_folder import PREFIX, SwapFolder
from launcher.training.swapped_states import build_async_io


def _plan(run_directory: str) -> Plan:
    return Plan.model_validate_json((Path(run_directory) / "plan.json").read_bytes())


def run(run_directory: str, data: str, folder: str, stop_after: int | None = None) -> dict[str, int]:
    """Train; returns the sizes of the swap files of this node when the last checkpoint is about to be saved."""
    context = cases._context(run_directory)
    if stop_after is not None:
        cases._stop_at(context, stop_after)
    heartbeat, enter = context.heartbeat, context.heartbeat.enter
    sizes: dict[str, int] = {}

    def watching(phase: Any) -> None:
        if phase == Phase.SAVE:
            sizes.update({str(path.relative_to(folder)): path.stat().st_size for path in swap_files(folder)})
        enter(phase)

    heartbeat.enter = watching  # type: ignore[method-assign]  # watched on purpose
    try:
        train(_plan(run_directory), context, PreparedData.load(Path(data)), torch.device("cpu"))
    finally:
        cases.forget_groups()
    return sizes


def swap_files(folder: str) -> list[Path]:
    """Files of states and gradients in a folder that runs share."""
    return sorted(Path(folder).glob(f"{PREFIX}*/**/*.swp"))


def refusal(run_directory: str, file_system: str = "", folder: str = "", room: int = 0, fill: int = 0) -> str | None:
    """What a start says of its folder, on a file system of its own for this process where one is named.

    Args:
        run_directory: of the run.
        file_system: `tmpfs` or `ramfs`, mounted over `folder`.
        folder: to mount over.
        room: bytes of a tmpfs.
        fill: bytes that are there already.
    """
    if file_system:
        mount(folder, file_system, f"size={room}" if room else "")
        (Path(folder) / "others").write_bytes(bytes(fill))
    try:
        SwapFolder(_plan(run_directory)).close()
    except RecipeError as error:
        return str(error)
    return None


def mount(folder: str, file_system: str, options: str) -> None:
    """Mount a file system over a folder, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    private, recursive, new_mounts = 1 << 18, 1 << 14, 0x20000
    calls = (
        lambda: libc.unshare(new_mounts),
        lambda: libc.mount(b"none", b"/", None, private | recursive, None),
        lambda: libc.mount(file_system.encode(), folder.encode(), file_system.encode(), 0, options.encode()),
    )
    for call in calls:
        if call() != 0:
            raise OSError(ctypes.get_errno(), "cannot mount")


def start_and_die(run_directory: str) -> None:
    """Make the folder of a start, put a file in it, and end as a killed rank does."""
    swap = SwapFolder(_plan(run_directory))
    (swap.path / "states.swp").write_bytes(b"x")
    os.kill(os.getpid(), signal.SIGKILL)


def start_beside(run_directory: str) -> list[list[str]]:
    """What is in the shared folder while one start runs, while another one runs beside it, and after both."""
    plan = _plan(run_directory)
    folder = Path(plan.deepspeed_config["zero_optimization"]["offload_optimizer"]["nvme_path"])
    seen, starts = [], []
    for _ in range(2):
        starts.append(SwapFolder(plan))
        seen.append(sorted(path.name for path in folder.iterdir()))
    assert all(start.path.name in seen[-1] for start in starts)
    for start in starts:
        start.close()
    return [*seen, [path.name for path in folder.iterdir()]]


def refusal_to_compile() -> str | None:
    """What is said where there is no compiler."""
    before = os.environ.get("CC")
    os.environ["CC"] = "/bin/false"
    try:
        build_async_io()
    except RecipeError as error:
        return str(error)
    finally:
        os.environ.pop("CC")
        if before is not None:
            os.environ["CC"] = before
    return None


def compiled() -> bool:
    """Have the operation compiled, or loaded, and leave a lock behind as a killed process would."""
    from torch.utils.cpp_extension import _get_build_directory

    lock = Path(_get_build_directory("async_io", verbose=False)) / "lock"
    lock.touch()
    build_async_io()
    return not lock.exists()


def memory(run_directory: str) -> dict[str, int]:
    """Bytes of each kind that this rank holds in memory, as `tests/planning/model_states_worker.py` counts them."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.planning.model_states_worker import run as measured

    try:
        return measured(_plan(run_directory))
    finally:
        cases.forget_groups()
