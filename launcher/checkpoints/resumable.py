"""Whether a plan can continue from a checkpoint. Decided before a worker starts, from the two manifests alone."""

from pathlib import Path
from typing import Any

from launcher.checkpoints.manifest import Manifest
from launcher.errors import CheckpointError
from launcher.planning.plan import Plan
from launcher.recipe.loading import differences

FIXED_SECTIONS = ("task", "seed", "model", "tokenizer", "data")
"""Recipe sections that a resumed run must share with its checkpoint; the others (schedule, batch, ...) may change."""
FREE_FIELDS = ("data.cache_directory", "data.preprocessing_num_workers", "data.on_change")
"""Fields in them that change nothing of what is learned."""


def recipe_changes(manifest: Manifest, plan: Plan) -> list[str]:
    """What the checkpoint learned from or with that the plan would change, a line each; empty when it can continue."""
    return [
        line
        for line in differences(manifest.recipe, plan.recipe, FIXED_SECTIONS)
        if not line.startswith(tuple(f"{field}:" for field in FREE_FIELDS))
    ]


def check_resumable(manifest: Manifest, plan: Plan, data_fingerprint: str, folder: Path) -> None:
    """Refuse a checkpoint that this plan cannot continue.

    Raises:
        CheckpointError: says every difference, and what to do.
    """
    changed = recipe_changes(manifest, plan)
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
