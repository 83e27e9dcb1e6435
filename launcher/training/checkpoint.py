"""Saving and loading a run's checkpoints, by all ranks together."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.checkpoints import folders
from launcher.checkpoints.files import FileRecord
from launcher.checkpoints.manifest import Manifest, faults_of, manifest_hash, read_manifest
from launcher.checkpoints.resumable import check_resumable, partitioning_of
from launcher.checkpoints.retention import prune
from launcher.errors import CheckpointError, StorageError
from launcher.planning.plan import Plan
from launcher.recipe.loading import recipe_hash
from launcher.training import upstream
from launcher.training.checkpoint_files import CheckpointFiles
from launcher.training.collective_folder import CollectiveFolder, attempted
from launcher.training.distributed import all_gather, broadcast
from launcher.training.shared_directory import check_shared
from launcher.training.universal import convert
from launcher.training.universal_load import load_universal

WRITERS = ("zerofleet", "torch", "deepspeed", "transformers")


@dataclass
class Progress:
    """Where a run is; all that a checkpoint holds besides DeepSpeed's state.

    Attributes:
        step: optimizer steps completed.
        consumed_samples: samples of the global order already trained on.
        best_eval_loss: lowest validation loss (or watched metric, smaller is better) so far.
        evaluations_without_improvement: for early stopping.
        eval_loss: validation loss measured at step `eval_step`.
        eval_score: the watched metric of that step, smaller is better.
        eval_step: step of the last evaluation.
    """

    step: int = 0
    consumed_samples: int = 0
    best_eval_loss: float | None = None
    evaluations_without_improvement: int = 0
    eval_loss: float | None = None
    eval_score: float | None = None
    eval_step: int = -1


class CheckpointManager:
    """Saves, verifies, loads and prunes the checkpoints of one run; every rank has one, and its methods are collective.

    Args:
        directory: the run's folder of checkpoints.
        plan: of the run.
        data_fingerprint: of the prepared data.
        notify: told what a person should know, on rank 0.

    Raises:
        StorageError: the ranks do not see the same folder.
    """

    def __init__(
        self, directory: Path, plan: Plan, data_fingerprint: str, notify: Callable[[str], None] = lambda text: None
    ) -> None:
        self.directory = directory
        self.plan = plan
        self.data_fingerprint = data_fingerprint
        self.notify = notify
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.files = CheckpointFiles(self.rank)
        self.failed_saves = 0
        self._saves = 0
        self._saves_adapter = False
        self._attempt = check_shared(directory)

    def save(self, engine: Any, progress: Progress, reason: str = "interval") -> bool:
        """Save the engine's state after `progress.step` steps, then prune.

        Returns:
            Whether it was saved; if not, every rank knows, a person has been told, and training may go on.

        Raises:
            StorageError: more saves in a row failed than `checkpoint.max_failed_saves`, or one that must not fail.
        """
        folder = self._new_folder(progress.step)
        engine.checkpoint_engine = self.files
        upstream.leave_out_recovery_scripts(engine)
        if self.plan.recipe.adapter is not None and not self._saves_adapter:
            upstream.leave_out_frozen_aliases(engine)
            self._saves_adapter = True
        errors = folder.make()
        if not errors:
            self.files.begin(folder.incomplete)
            state = {"parameter_names": parameter_names(engine)}
            engine.save_checkpoint(
                str(self.directory),
                tag=folder.incomplete.name,
                client_state=state,
                save_latest=False,
                exclude_frozen_parameters=self.plan.recipe.adapter is not None,
            )
            errors = folder.record(self.files.records, self.files.errors)
        errors = errors or folder.commit(self._manifest(progress, reason))
        if not errors:
            self.failed_saves = 0
            if self.rank == 0:
                folders.point_to(self.directory / folders.folder_name(progress.step))
                prune(self.directory, self.plan.recipe.checkpoint)
            return True
        folder.abandon()
        self._fail(progress.step, errors, final=reason in ("end", "stop"))
        return False

    def _new_folder(self, step: int, suffix: str = "") -> CollectiveFolder:
        self._saves += 1
        name = folders.folder_name(step) + suffix + folders.INCOMPLETE
        return CollectiveFolder(self.directory / name, f"{self._attempt}.{self._saves}")

    def _fail(self, step: int, errors: list[str], *, final: bool) -> None:
        self.failed_saves += 1
        allowed = self.plan.recipe.checkpoint.max_failed_saves
        text = (
            f"checkpoint at step {step} cannot be written to {self.directory} "
            f"({_free_space(self.directory)} free there): {'; '.join(errors)}"
        )
        if final or self.failed_saves > allowed:
            raise StorageError(text)
        if self.rank == 0:
            self.notify(
                f"{text}\ntraining goes on without it; {self.failed_saves} of checkpoint.max_failed_saves {allowed}"
            )

    def load(self, engine: Any) -> Progress:
        """Load the newest checkpoint that verifies into the engine; without any checkpoint, return the start.

        Raises:
            CheckpointError: there are checkpoints but none of them verifies, or this plan cannot continue from it.
        """
        folder = self._newest_verified()
        if folder is None:
            return Progress()
        manifest = read_manifest(folder)
        resumption = check_resumable(manifest, self.plan, self.data_fingerprint, folder)
        engine.checkpoint_engine = self.files
        adapter = self.plan.recipe.adapter is not None
        if resumption.differences and adapter:
            raise CheckpointError(
                f"{folder} was saved in another layout ({'; '.join(map(str, resumption.differences))}); an adapter's "
                "checkpoint is continued in its own"
            )
        if resumption.differences:
            load_universal(engine, self._converted(folder, manifest), self.plan.zero_stage)
        else:
            # The frozen weights come from the model, not from the checkpoint.
            engine.load_checkpoint(str(self.directory), tag=folder.name, load_module_strict=not adapter)
        from_the_start = resumption.data_changed and self.plan.recipe.data.on_change == "restart"
        return Progress(
            step=manifest.step,
            consumed_samples=0 if from_the_start else manifest.consumed_samples,
            best_eval_loss=manifest.best_eval_loss,
            evaluations_without_improvement=manifest.evaluations_without_improvement,
        )

    def _converted(self, folder: Path, manifest: Manifest) -> Path:
        """The checkpoint's universal form, from the cache beside it or made now by all ranks together.

        Raises:
            StorageError: it cannot be written.
        """
        cached = folders.universal_of(folder)
        source = manifest_hash(folder)
        if broadcast(lambda: _is_converted(cached, source)):
            if not self._faults(cached):
                return cached
            broadcast(lambda: folders.delete(cached, "cache"))
        began = time.monotonic()
        self._tell(f"converting {folder.name} ({_size(manifest.size)}) for this layout")
        target = self._new_folder(manifest.step, folders.UNIVERSAL)
        errors = target.make()
        if not errors:
            records: dict[str, FileRecord] = {}
            threads = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            wrong = attempted(
                lambda: records.update(
                    convert(folder, manifest, target.incomplete, self.rank, self.world_size, threads)
                )
            )
            errors = target.record(records, wrong)
        facts = {"kind": "universal", "source": source, "reason": "convert", "saved_at": time.time()}
        errors = errors or target.commit(manifest.model_copy(update=facts))
        if errors:
            target.abandon()
            raise StorageError(
                f"{folder} cannot be converted for this layout ({_free_space(self.directory)} free there): "
                + "; ".join(errors)
            )
        size = _size(read_manifest(cached).size)
        self._tell(f"converted in {time.monotonic() - began:.1f} s; {cached.name} has {size}")
        return cached

    def _newest_verified(self) -> Path | None:
        """The newest checkpoint whose files all ranks together found whole; the bad ones before it are set aside."""
        set_aside = []
        for note in broadcast(lambda: folders.tidy(self.directory)):
            self._tell(note)
        while True:
            name = broadcast(lambda: _newest_name(self.directory))
            if name is None:
                break
            folder = self.directory / name
            wrong = self._faults(folder)
            if not wrong:
                return folder
            moved = str(broadcast(partial(folders.set_aside, folder)))
            set_aside.append(moved)
            self._tell(f"checkpoint {name} is damaged: {'; '.join(wrong)}. It is set aside as {moved}")
        if set_aside:
            raise CheckpointError(
                f"no checkpoint of {self.directory} can be trusted; set aside: {', '.join(set_aside)}. "
                "Run again to start from the beginning, or put a sound checkpoint there."
            )
        return None

    def _faults(self, folder: Path) -> list[str]:
        """What is wrong with a folder, each rank looking at a part of it."""
        contents = self.plan.recipe.checkpoint.verify == "full"
        parts = all_gather(faults_of(folder, contents=contents, share=(self.rank, self.world_size)))
        return sorted({fault for part in parts for fault in part})

    def _tell(self, text: str) -> None:
        if self.rank == 0:
            self.notify(text)

    def _manifest(self, progress: Progress, reason: str) -> Manifest:
        recipe = self.plan.recipe
        return Manifest(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            layout=self.plan.layout,
            batch=self.plan.batch,
            partitioning=partitioning_of(self.plan.deepspeed_config),
            zero_stage=self.plan.zero_stage,
            precision=recipe.training.precision,
            data_fingerprint=self.data_fingerprint,
            recipe=recipe,
            recipe_hash=recipe_hash(recipe),
            best_eval_loss=progress.best_eval_loss,
            evaluations_without_improvement=progress.evaluations_without_improvement,
            eval_loss=progress.eval_loss if progress.eval_step == progress.step else None,
            eval_score=progress.eval_score if progress.eval_step == progress.step else None,
            rng={"seed": recipe.seed, "each_step": "blake2b(seed:step:rank)"},
            versions={name: version(name) for name in WRITERS},
            saved_at=time.time(),
            reason=reason,
            files={},
        )


def _newest_name(checkpoints: Path) -> str | None:
    present = folders.complete(checkpoints)
    return present[-1].name if present else None


def _is_converted(cached: Path, source: str) -> bool:
    """Whether the cache was made from this very checkpoint; whether its files are whole is another question."""
    try:
        return read_manifest(cached).source == source
    except CheckpointError:
        return False


def parameter_names(engine: Any) -> list[list[str]]:
    """Names of the trained parameters, group by group, in the order in which ZeRO 0's optimizer numbers its states."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [
        [names[parameter] for parameter in group["params"] if parameter in names]
        for group in engine.optimizer.param_groups
    ]


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
