"""`zerofleet tensorboard`: TensorBoard over one or several runs, on loopback."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from launcher.errors import RunDirectoryError
from launcher.run_directory import RunDirectory

HOST = "127.0.0.1"


def tensorboard(
    runs: Annotated[list[str], typer.Argument(help="Run directories, or names below runs/.", metavar="RUN...")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 6006,
) -> None:
    """Show runs in TensorBoard.

    It listens on 127.0.0.1 only; to look from afar, forward the port: `ssh -L 6006:127.0.0.1:6006 HOST`.
    """
    sources = tensorboard_sources(runs)
    arguments = ["-m", "tensorboard.main", *sources, "--host", HOST, "--port", str(port)]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 - the point is to become TensorBoard


def tensorboard_sources(runs: list[str]) -> list[str]:
    """Make the arguments that tell TensorBoard where the runs' events are.

    Raises:
        RunDirectoryError: one of them is no run directory, or has a name that TensorBoard cannot take.
    """
    folders = {run: _event_folder(run) for run in runs}
    if len(folders) == 1:
        return ["--logdir", *map(str, folders.values())]
    for folder in folders.values():
        if "," in str(folder):
            raise RunDirectoryError(
                f"{folder}: TensorBoard separates runs by commas; rename the folder or show it alone"
            )
    return ["--logdir_spec", ",".join(f"{_label(run)}:{folder}" for run, folder in folders.items())]


def _event_folder(run: str) -> Path:
    for path in (Path(run), Path("runs") / run):
        directory = RunDirectory.at(path)
        if directory.tensorboard.is_dir():
            return directory.tensorboard
    raise RunDirectoryError(f"{run} is no run directory: neither {run}/tensorboard nor runs/{run}/tensorboard exists")


def _label(run: str) -> str:
    """Name a run in TensorBoard's list; a colon ends the name, a slash before it would make it a path."""
    return run.strip("/").replace(":", "_")
