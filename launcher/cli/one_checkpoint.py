"""Which checkpoint of a run a command works on, and what it needs besides."""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.run_directory import RunDirectory

if TYPE_CHECKING:
    from launcher.data.store import PreparedData
    from launcher.planning.plan import Plan


def one_checkpoint(run_dir: Path, step: int | None, ema: bool | None = None) -> tuple[RunDirectory, "Plan", Path]:
    """The checkpoint of a step, or the newest.

    Args:
        run_dir: of the run.
        step: `None`: the newest.
        ema: its averaged weights, or not; `None`: as the recipe says.

    Raises:
        CheckpointError: there is none.
    """
    from launcher.checkpoints import folders
    from launcher.errors import CheckpointError
    from launcher.orchestration.driver import read_plan
    from launcher.planning.methods import with_average

    directory = RunDirectory.at(run_dir)
    plan = read_plan(directory)
    present = {folders.step_of(path): path for path in folders.complete(directory.checkpoints)}
    if not present:
        raise CheckpointError(f"{directory.checkpoints} holds no complete checkpoint")
    chosen = max(present) if step is None else step
    if chosen not in present:
        known = ", ".join(map(str, sorted(present)))
        raise CheckpointError(f"no complete checkpoint of step {step}; there are steps {known}")
    return directory, plan.model_copy(update={"recipe": with_average(plan.recipe, ema)}), present[chosen]


def data_of(directory: RunDirectory) -> "PreparedData":
    """The prepared data of a run."""
    from launcher.data.store import PreparedData

    return PreparedData.load(Path(json.loads(directory.data.read_text())["directory"]))


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Keep what libraries print off the output: it belongs to the result."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(sys.stderr):
        yield
