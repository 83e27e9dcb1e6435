"""What a complete checkpoint says of itself. No torch here: the driver reads it before it starts a worker."""

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from launcher.errors import CheckpointError
from launcher.planning.layout import Layout
from launcher.planning.plan import Plan
from launcher.recipe.loading import differences
from launcher.recipe.schema import Recipe
from launcher.run_directory import write_atomically

MANIFEST_NAME = "manifest.json"
INCOMPLETE_SUFFIX = ".incomplete"
FIXED_SECTIONS = (
    *("task", "seed", "model", "tokenizer"),
    *("data.sources", "data.validation_sources", "data.validation_fraction"),
    *("data.sequence_length", "data.packing", "data.cross_document_attention"),
)
"""What a resumed run must share with its checkpoint; the others (schedule, batch, where data is kept) may change."""


class Manifest(BaseModel):
    """Written last into a checkpoint's folder: a folder without it is not a checkpoint.

    Attributes:
        version: of this form.
        step: optimizer steps completed.
        consumed_samples: samples of the global order already trained on.
        layout: sizes of the parallel groups that saved it.
        zero_stage: of the engine that saved it.
        precision: of the engine that saved it.
        data_fingerprint: of the prepared data.
        recipe: the run's recipe at that time.
        best_eval_loss: lowest validation loss so far.
        evaluations_without_improvement: for early stopping.
        files: size in bytes of each file, by path relative to the folder.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    step: int
    consumed_samples: int
    layout: Layout
    zero_stage: int
    precision: str
    data_fingerprint: str
    recipe: Recipe
    best_eval_loss: float | None
    evaluations_without_improvement: int
    files: dict[str, int]


def folder_name(step: int) -> str:
    """Name of the folder of one step's checkpoint."""
    return f"step_{step:08d}"


def complete(checkpoints: Path) -> list[Path]:
    """Folders of complete checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    folders = [path for path in checkpoints.glob("step_*") if not path.name.endswith(INCOMPLETE_SUFFIX)]
    return sorted(path for path in folders if (path / MANIFEST_NAME).is_file())


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest and compare the sizes of its files.

    Raises:
        CheckpointError: the manifest is unreadable or newer than this code, or a file is missing or cut off.
    """
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValidationError) as error:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST_NAME} cannot be read: {error}") from error
    wrong = []
    for name, size in manifest.files.items():
        path = folder / name
        present = path.stat().st_size if path.is_file() else None
        if present != size:
            wrong.append(f"{name} has {'no file' if present is None else f'{present} bytes'} instead of {size} bytes")
    if wrong:
        raise CheckpointError(
            f"checkpoint {folder} is damaged: {'; '.join(wrong)}. "
            "Move the folder away to resume from the one before it."
        )
    return manifest


def commit(incomplete: Path, manifest: Manifest) -> Path:
    """Make a fully written folder visible: manifest last, then the rename.

    Returns:
        The folder under its final name.
    """
    files = {
        str(path.relative_to(incomplete)): path.stat().st_size
        for path in sorted(incomplete.rglob("*"))
        if path.is_file()
    }
    write_atomically(incomplete / MANIFEST_NAME, manifest.model_copy(update={"files": files}).model_dump_json(indent=1))
    final = incomplete.with_name(incomplete.name.removesuffix(INCOMPLETE_SUFFIX))
    if final.exists():  # the same step again, after going back to an older checkpoint
        shutil.rmtree(final)
    incomplete.rename(final)
    sync_folder(final.parent)
    return final


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_incomplete(checkpoints: Path) -> list[str]:
    """Delete what interrupted saves left; called by the driver while no worker runs."""
    leftovers = [path for path in checkpoints.glob(f"step_*{INCOMPLETE_SUFFIX}") if path.is_dir()]
    for path in leftovers:
        shutil.rmtree(path)
    return [path.name for path in leftovers]


def check_resumable(manifest: Manifest, plan: Plan, data_fingerprint: str, folder: Path) -> None:
    """Refuse a checkpoint that this plan cannot continue.

    Raises:
        CheckpointError: says every difference, and what to do.
    """
    changed = differences(manifest.recipe, plan.recipe, FIXED_SECTIONS)
    if not changed and manifest.data_fingerprint != data_fingerprint:
        changed = ["data: the files' contents are not those of the checkpoint"]
    if changed:
        raise CheckpointError(
            f"the run in {folder.parent.parent} was trained with another recipe:\n  "
            + "\n  ".join(changed)
            + "\nStart a new run with --run-dir, or give the recipe the checkpoint's values."
        )
    shape: dict[str, tuple[Any, Any]] = {"zero.stage": (manifest.zero_stage, plan.zero_stage)}
    shape |= {name: (size, getattr(plan.layout, name)) for name, size in manifest.layout.model_dump().items()}
    shape["training.precision"] = (manifest.precision, plan.recipe.training.precision)
    different = [f"{name}: {then} in the checkpoint, {now} now" for name, (then, now) in shape.items() if then != now]
    if different:
        raise CheckpointError(
            f"checkpoint {folder} was saved in another layout, which this version cannot convert:\n  "
            + "\n  ".join(different)
            + "\nRun with the checkpoint's values, or start a new run with --run-dir."
        )
