"""Saving and loading DeepSpeed's sharded state, made visible only when complete."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.checkpoints import manifest as manifests
from launcher.checkpoints.manifest import Manifest
from launcher.errors import StorageError
from launcher.planning.plan import Plan


@dataclass
class Progress:
    """Where a run is; all that a checkpoint holds besides DeepSpeed's state.

    Attributes:
        step: optimizer steps completed.
        consumed_samples: samples of the global order already trained on.
        best_eval_loss: lowest validation loss so far.
        evaluations_without_improvement: for early stopping.
    """

    step: int = 0
    consumed_samples: int = 0
    best_eval_loss: float | None = None
    evaluations_without_improvement: int = 0


class CheckpointManager:
    """Saves, finds, loads and prunes the checkpoints of one run; every rank has one, and calls are collective.

    The order on disk: every rank writes into `step_XXXXXXXX.incomplete/`; after a barrier rank 0 writes the manifest
    and renames the folder. A crash before the rename leaves a folder that no reader takes for a checkpoint.
    """

    def __init__(self, directory: Path, plan: Plan, data_fingerprint: str) -> None:
        self.directory = directory
        self.plan = plan
        self.data_fingerprint = data_fingerprint

    def save(self, engine: Any, progress: Progress) -> None:
        """Save the engine's state after `progress.step` steps, then prune.

        Raises:
            StorageError: this rank could not write; the incomplete folder is left for the driver to remove.
        """
        tag = manifests.folder_name(progress.step) + manifests.INCOMPLETE_SUFFIX
        folder = self.directory / tag
        try:
            engine.save_checkpoint(str(self.directory), tag=tag, client_state={}, save_latest=False)
            dist.barrier()
            if dist.get_rank() == 0:
                manifests.commit(folder, self._manifest(progress))
                self.prune()
        except (OSError, RuntimeError) as error:
            free = shutil.disk_usage(self.directory).free / 2**20
            raise StorageError(
                f"checkpoint at step {progress.step} cannot be written to {self.directory} "
                f"({free:,.0f} MiB free there): {error}"
            ) from error
        dist.barrier()

    def load(self, engine: Any) -> Progress:
        """Load the newest complete checkpoint into the engine; without one, return the start."""
        folders = manifests.complete(self.directory)
        if not folders:
            return Progress()
        folder = folders[-1]
        manifest = manifests.read_manifest(folder)
        manifests.check_resumable(manifest, self.plan, self.data_fingerprint, folder)
        engine.load_checkpoint(str(self.directory), tag=folder.name)
        return Progress(
            step=manifest.step,
            consumed_samples=manifest.consumed_samples,
            best_eval_loss=manifest.best_eval_loss,
            evaluations_without_improvement=manifest.evaluations_without_improvement,
        )

    def prune(self) -> None:
        """Delete the oldest complete checkpoints beyond `checkpoint.save_total_limit`."""
        limit = self.plan.recipe.checkpoint.save_total_limit
        if limit is None:
            return
        for folder in manifests.complete(self.directory)[:-limit]:
            # Without its manifest a half-deleted folder is no checkpoint.
            (folder / manifests.MANIFEST_NAME).unlink()
            shutil.rmtree(folder)

    def _manifest(self, progress: Progress) -> Manifest:
        return Manifest(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            layout=self.plan.layout,
            zero_stage=self.plan.zero_stage,
            precision=self.plan.recipe.training.precision,
            data_fingerprint=self.data_fingerprint,
            recipe=self.plan.recipe,
            best_eval_loss=progress.best_eval_loss,
            evaluations_without_improvement=progress.evaluations_without_improvement,
            files={},
        )
