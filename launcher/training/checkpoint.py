"""Saving and loading a run's checkpoints, by all ranks together."""

import shutil
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.checkpoints import folders
from launcher.checkpoints.manifest import Manifest, read_manifest
from launcher.checkpoints.memory import HostMemory
from launcher.checkpoints.resumable import check_resumable, partitioning_of
from launcher.checkpoints.retention import prune
from launcher.errors import StorageError
from launcher.planning.kept_states import saved_bytes
from launcher.planning.plan import Plan
from launcher.recipe.loading import recipe_hash
from launcher.training import upstream
from launcher.training.adalora import RankSchedule
from launcher.training.averaging import WeightAverage, has_averages
from launcher.training.background_save import BackgroundSaver, Outcome, Save
from launcher.training.checkpoint_files import CheckpointFiles
from launcher.training.collective_folder import CollectiveFolder, attempted
from launcher.training.distributed import broadcast
from launcher.training.host_memory import HostBuffer
from launcher.training.memory_saves import MemorySaver
from launcher.training.progress import Progress
from launcher.training.restore import Restorer
from launcher.training.shared_directory import check_shared
from launcher.training.universal_load import load_universal

FINAL = ("end", "stop")
"""Reasons of a save that must not fail."""
WAITED_FOR = (*FINAL, "request")
"""Reasons of a save that is over when training goes on."""
WRITERS = ("zerofleet", "torch", "deepspeed", "transformers")


class CheckpointManager:
    """Saves, verifies, loads and prunes the checkpoints of one run; every rank has one, and its methods are collective.

    Args:
        directory: the run's folder of checkpoints.
        plan: of the run.
        data_fingerprint: of the prepared data.
        notify: told what a person should know, on rank 0.
        average: of the trained weights, if the run keeps one.
        memory: nodes that keep states besides the disk, if there are any.
        ranks: of an adapter that loses some as it is trained.

    Raises:
        StorageError: the ranks do not see the same folder.
    """

    def __init__(
        self,
        directory: Path,
        plan: Plan,
        data_fingerprint: str,
        notify: Callable[[str], None] = lambda text: None,
        average: WeightAverage | None = None,
        memory: HostMemory | None = None,
        ranks: RankSchedule | None = None,
    ) -> None:
        self.average, self.ranks = average, ranks
        self.directory = directory
        self.plan = plan
        self.data_fingerprint = data_fingerprint
        self.notify = notify
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.files = CheckpointFiles(self.rank)
        self._recipe_hash = recipe_hash(plan.recipe)
        self._versions = {name: version(name) for name in WRITERS}  # 10 ms, which each save would wait for
        self.failed_saves = 0
        self._last_failure = ""
        self._known: list[Outcome] = []
        self._saves = 0
        self._saves_adapter = False
        self._attempt = check_shared(directory)
        self.background: BackgroundSaver | None = None
        self.from_memory = False
        expected = 0 if plan.memory is None else saved_bytes(plan.memory)
        self.memory = None if memory is None else MemorySaver(memory, self._attempt, notify, expected)

    def save(self, engine: Any, progress: Progress, reason: str = "interval") -> None:
        """Save the engine's state after `progress.step` steps, then prune; `outcomes` tells how that ended.

        With `checkpoint.asynchronous` this returns when the states are copied; the other saves, and those that
        somebody waits for, are over when it returns. Rank 0 knows the reason.

        Raises:
            StorageError: more saves in a row failed than `checkpoint.max_failed_saves`, or one that must not fail.
        """
        began = time.monotonic()
        reason, skipped, problem = broadcast(lambda: (reason, *self._before(progress.step, reason)))
        if problem is not None:
            raise StorageError(problem)
        if skipped:
            return
        folder = self._new_folder(progress.step)
        errors = folder.make()
        asynchronous = self.plan.recipe.checkpoint.asynchronous
        if asynchronous and not errors:
            self._copy(engine, progress, reason, folder, began)
        else:
            self._save_now(engine, progress, reason, folder, errors, began)
        if reason in WAITED_FOR or not asynchronous:
            self._finish_saves(final=reason in FINAL)

    def keep_in_memory(self, engine: Any, progress: Progress) -> bool:
        """Keep the state after `progress.step` steps in host memory; returns whether it is kept."""
        if self.memory is None:
            return False

        def hand_over(buffer: HostBuffer) -> list[str]:
            place = self.directory / f"{folders.folder_name(progress.step)}.memory"  # a name only: nothing is written
            self.files.begin(place, buffer)
            self._hand_over(engine, place)
            return self.files.errors

        return self.memory.save(self._manifest(progress, "memory"), hand_over)

    def _before(self, step: int, reason: str) -> tuple[bool, str | None]:
        """On rank 0: whether to skip this save, and why to give up instead of saving."""
        self._collect()
        if self.failed_saves > self.plan.recipe.checkpoint.max_failed_saves:
            return False, self._last_failure
        busy = self.background is not None and self.background.is_busy
        skipped = busy and self.plan.recipe.checkpoint.when_busy == "skip" and reason not in WAITED_FOR
        if skipped:
            self.notify(f"the checkpoint at step {step} is skipped: the one before it is still being written")
        return skipped, None

    def _save_now(
        self,
        engine: Any,
        progress: Progress,
        reason: str,
        folder: CollectiveFolder,
        errors: list[str],
        began: float,
    ) -> None:
        if not errors:
            self.files.begin(folder.incomplete)
            self._hand_over(engine, folder.incomplete)
            errors = folder.record(self.files.records, self.files.errors)
        errors = errors or folder.commit(self._manifest(progress, reason))
        if errors:
            folder.abandon()
        elif self.rank == 0:
            self._committed(self.directory / folders.folder_name(progress.step))
        seconds = time.monotonic() - began
        self._ended(Outcome(progress.step, reason, tuple(errors), seconds, blocked_seconds=seconds))

    def _copy(self, engine: Any, progress: Progress, reason: str, folder: CollectiveFolder, began: float) -> None:
        background = self.background = self.background or BackgroundSaver(self._committed)
        buffer = background.free_buffer()
        save = Save(
            folder.incomplete, folder.token, self._manifest(progress, reason), buffer, began, reason not in WAITED_FOR
        )
        self.files.begin(folder.incomplete, buffer)
        self._hand_over(engine, folder.incomplete)
        save.errors.extend(self.files.errors)
        background.begin(save)

    def _hand_over(self, engine: Any, folder: Path) -> None:
        """Let DeepSpeed give its states to `self.files`; and the averages."""
        engine.checkpoint_engine = self.files
        upstream.leave_out_recovery_scripts(engine)
        if self.plan.recipe.adapter is not None and not self._saves_adapter:
            upstream.leave_out_frozen_aliases(engine)
            self._saves_adapter = True
        state = {"parameter_names": parameter_names(engine)}
        engine.save_checkpoint(
            str(self.directory),
            tag=folder.name,
            client_state=state,
            save_latest=False,
            exclude_frozen_parameters=self.plan.recipe.adapter is not None,
        )
        if self.average is not None and (self.plan.zero_stage > 0 or self.rank == 0):
            self.average.save(self.files, folder)
        if self.ranks is not None:
            self.ranks.save(self.files, folder)

    def _committed(self, folder: Path) -> None:
        """What follows a commit; when it goes wrong, the checkpoint is one all the same."""
        for error in attempted(lambda: folders.point_to(folder)) + attempted(
            lambda: prune(self.directory, self.plan.recipe.checkpoint)
        ):
            self._tell(f"{folder.name} is saved, but what comes after a save failed: {error}")

    def outcomes(self) -> list[Outcome]:
        """How saves ended since the last call; on rank 0, and of its own part on another rank."""
        self._collect()
        known, self._known = self._known, []
        return known

    def _collect(self) -> None:
        for outcome in [] if self.background is None else self.background.outcomes():
            self._ended(outcome)

    def _ended(self, outcome: Outcome) -> None:
        self._known.append(outcome)
        if not outcome.errors:
            self.failed_saves = 0
            return
        self.failed_saves += 1
        allowed = self.plan.recipe.checkpoint.max_failed_saves
        self._last_failure = (
            f"checkpoint at step {outcome.step} cannot be written to {self.directory} "
            f"({_free_space(self.directory)} free there): {'; '.join(outcome.errors)}"
        )
        if outcome.reason not in FINAL and self.failed_saves <= allowed:
            self._tell(
                f"{self._last_failure}\ntraining goes on without it; {self.failed_saves} of "
                f"checkpoint.max_failed_saves {allowed}"
            )

    def _finish_saves(self, *, final: bool) -> None:
        """Wait for all that is in flight.

        Raises:
            StorageError: the last save of the run failed, or too many in a row.
        """
        if self.background is not None:
            self.background.drain()
        problem = broadcast(lambda: self._problem(final=final))
        if problem is not None:
            raise StorageError(problem)

    def _problem(self, *, final: bool) -> str | None:
        """On rank 0: why the run cannot go on, or end, with the saves as they are."""
        self._collect()
        failed = self.failed_saves > (0 if final else self.plan.recipe.checkpoint.max_failed_saves)
        return self._last_failure if failed else None

    def close(self) -> None:
        """End what works beside the training; what is in flight is given up unless it was waited for."""
        if self.background is not None:
            self.background.close()
            self.background = None
        if self.memory is not None:
            self.memory.close()
            self.memory = None

    def _new_folder(self, step: int) -> CollectiveFolder:
        self._saves += 1
        name = folders.folder_name(step) + folders.INCOMPLETE
        return CollectiveFolder(self.directory / name, f"{self._attempt}.{self._saves}")

    def load(self, engine: Any) -> Progress:
        """Load the newest checkpoint that verifies into the engine; without any checkpoint, return the start.

        Raises:
            CheckpointError: there are checkpoints but none of them verifies, or this plan cannot continue from it.
        """
        restorer = Restorer(self.directory, self.plan, self._tell, self._attempt)
        kept = self._newest_in_memory()
        if self.memory is not None and kept is not None:
            with self.memory.as_folder(kept, self.files) as place:
                progress = self._load(engine, place, kept, restorer)
            self._tell(f"resumed from memory at step {kept.step}")
            self.from_memory = True
            return progress
        folder = restorer.newest_verified()
        return Progress() if folder is None else self._load(engine, folder, read_manifest(folder), restorer)

    def _newest_in_memory(self) -> Manifest | None:
        """What memory has that no checkpoint has yet; for another layout it becomes a checkpoint first."""
        kept = None if self.memory is None else self.memory.newest(self.directory)
        if self.memory is None or kept is None:
            return None
        differences = check_resumable(kept, self.plan, self.data_fingerprint, self.directory / "memory").differences
        if not differences:
            return kept
        errors = self.memory.write_down(kept, self.directory)
        how = f"cannot be written: {'; '.join(errors)}" if errors else "is written to be converted"
        self._tell(f"the state of step {kept.step} in memory {how} ({'; '.join(differences)})")
        return None

    def _load(self, engine: Any, folder: Path, manifest: Manifest, restorer: Restorer) -> Progress:
        resumption = check_resumable(manifest, self.plan, self.data_fingerprint, folder)
        engine.checkpoint_engine = self.files
        adapter = self.plan.recipe.adapter is not None
        universal = restorer.converted(folder, manifest) if resumption.differences else None
        if universal is not None:
            load_universal(engine, universal, self.plan.zero_stage)
        else:
            # The frozen weights come from the model, not from the checkpoint.
            engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=not adapter)
        if self.average is not None:
            self._load_average(self.average, folder, manifest, universal)
        if self.ranks is not None:
            self.ranks.load(folder, manifest, lambda path: self.files.load(str(path), "cpu"))
        from_the_start = resumption.data_changed and self.plan.recipe.data.on_change == "restart"
        return Progress(
            step=manifest.step,
            consumed_samples=0 if from_the_start else manifest.consumed_samples,
            best_eval_loss=manifest.best_eval_loss,
            evaluations_without_improvement=manifest.evaluations_without_improvement,
        )

    def _load_average(self, average: WeightAverage, folder: Path, manifest: Manifest, universal: Path | None) -> None:
        if not has_averages(manifest):
            self._tell(f"{folder.name} was saved without training.ema: the average begins with its weights")
            average.restart()
        elif universal is not None:
            average.load_universal(universal)
        else:
            average.load(folder, lambda path: self.files.load(str(path), "cpu"))

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
            recipe_hash=self._recipe_hash,
            best_eval_loss=progress.best_eval_loss,
            evaluations_without_improvement=progress.evaluations_without_improvement,
            eval_loss=progress.eval_loss if progress.eval_step == progress.step else None,
            eval_score=progress.eval_score if progress.eval_step == progress.step else None,
            rng={"seed": recipe.seed, "each_step": "blake2b(seed:step:rank)"},
            versions=self._versions,
            saved_at=time.time(),
            reason=reason,
            files={},
        )


def parameter_names(engine: Any) -> list[list[str]]:
    """Names of the trained parameters, group by group, in the order in which ZeRO 0's optimizer numbers its states."""
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return [
        [names[parameter] for parameter in group["params"] if parameter in names]
        for group in engine.optimizer.param_groups
    ]


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
