"""Saving and loading a run's checkpoints, by all ranks together."""

import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from launcher.checkpoints import folders
from launcher.checkpoints.faults import reach
from launcher.checkpoints.manifest import Manifest, RankManifest, faults_of, read_manifest
from launcher.checkpoints.resumable import check_resumable
from launcher.errors import CheckpointError, StorageError
from launcher.planning.plan import Plan
from launcher.recipe.loading import recipe_hash
from launcher.training import upstream
from launcher.training.checkpoint_files import CheckpointFiles
from launcher.training.distributed import all_gather, broadcast
from launcher.training.shared_directory import check_shared

WRITERS = ("zerofleet", "torch", "deepspeed", "transformers")


@dataclass
class Progress:
    """Where a run is; all that a checkpoint holds besides DeepSpeed's state.

    Attributes:
        step: optimizer steps completed.
        consumed_samples: samples of the global order already trained on.
        best_eval_loss: lowest validation loss so far.
        evaluations_without_improvement: for early stopping.
        eval_loss: validation loss measured at step `eval_step`.
        eval_step: step of the last evaluation.
    """

    step: int = 0
    consumed_samples: int = 0
    best_eval_loss: float | None = None
    evaluations_without_improvement: int = 0
    eval_loss: float | None = None
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
        self._attempt = check_shared(directory)

    def save(self, engine: Any, progress: Progress, reason: str = "interval") -> bool:
        """Save the engine's state after `progress.step` steps, then prune.

        Returns:
            Whether it was saved; if not, every rank knows, a person has been told, and training may go on.

        Raises:
            StorageError: more saves in a row failed than `checkpoint.max_failed_saves`, or one that must not fail.
        """
        self._saves += 1
        incomplete = self.directory / (folders.folder_name(progress.step) + folders.INCOMPLETE)
        token = f"{self._attempt}.{self._saves}"
        errors = self._write(engine, incomplete, token)
        if not errors:
            errors = self._commit(incomplete, token, progress, reason)
        if not errors:
            self.failed_saves = 0
            return True
        if self.rank == 0:
            folders.delete(incomplete, "fail")
        self._fail(progress.step, errors, final=reason in ("end", "stop"))
        return False

    def _write(self, engine: Any, incomplete: Path, token: str) -> list[str]:
        """Write every rank's part; returns what went wrong on any rank, the same on all."""
        engine.checkpoint_engine = self.files
        upstream.leave_out_recovery_scripts(engine)
        errors = broadcast(lambda: _attempted(lambda: _make_empty(incomplete)))
        if errors:
            return errors
        self.files.begin(incomplete)
        engine.save_checkpoint(str(self.directory), tag=incomplete.name, client_state={}, save_latest=False)
        part = RankManifest(rank=self.rank, token=token, files=self.files.records)
        errors = self.files.errors or _attempted(lambda: folders.write_rank_manifest(incomplete, part))
        return [
            f"rank {rank} on {host}: {text}"
            for rank, (host, texts) in enumerate(all_gather((socket.gethostname(), errors)))
            for text in texts
        ]

    def _commit(self, incomplete: Path, token: str, progress: Progress, reason: str) -> list[str]:
        """Rank 0 makes the checkpoint visible; the others wait for it."""

        def commit() -> None:
            parts = {}
            for rank in range(self.world_size):
                part = folders.read_rank_manifest(incomplete, rank, token)
                if part is None:
                    raise CheckpointError(f"rank {rank} wrote its part where rank 0 does not see it: {incomplete}")
                parts[rank] = part
            folders.point_to(folders.commit(incomplete, self._manifest(progress, reason), parts))

        errors = broadcast(lambda: _attempted(commit))
        if not errors and self.rank == 0:
            self.prune()
        return errors

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
        check_resumable(manifest, self.plan, self.data_fingerprint, folder)
        engine.checkpoint_engine = self.files
        engine.load_checkpoint(str(self.directory), tag=folder.name)
        return Progress(
            step=manifest.step,
            consumed_samples=manifest.consumed_samples,
            best_eval_loss=manifest.best_eval_loss,
            evaluations_without_improvement=manifest.evaluations_without_improvement,
        )

    def _newest_verified(self) -> Path | None:
        """The newest checkpoint whose files all ranks together found whole; the bad ones before it are set aside."""
        contents = self.plan.recipe.checkpoint.verify == "full"
        set_aside = []
        for note in broadcast(lambda: folders.tidy(self.directory)):
            self._tell(note)
        while True:
            name = broadcast(lambda: _newest_name(self.directory))
            if name is None:
                break
            folder = self.directory / name
            faults = all_gather(faults_of(folder, contents=contents, share=(self.rank, self.world_size)))
            wrong = sorted({fault for part in faults for fault in part})
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

    def _tell(self, text: str) -> None:
        if self.rank == 0:
            self.notify(text)

    def prune(self) -> None:
        """Delete the oldest complete checkpoints beyond `checkpoint.save_total_limit`; for one process."""
        limit = self.plan.recipe.checkpoint.save_total_limit
        if limit is None:
            return
        for folder in folders.complete(self.directory)[:-limit]:
            folders.delete(folder, "prune")

    def _manifest(self, progress: Progress, reason: str) -> Manifest:
        recipe = self.plan.recipe
        return Manifest(
            step=progress.step,
            consumed_samples=progress.consumed_samples,
            layout=self.plan.layout,
            zero_stage=self.plan.zero_stage,
            precision=recipe.training.precision,
            data_fingerprint=self.data_fingerprint,
            recipe=recipe,
            recipe_hash=recipe_hash(recipe),
            best_eval_loss=progress.best_eval_loss,
            evaluations_without_improvement=progress.evaluations_without_improvement,
            eval_loss=progress.eval_loss if progress.eval_step == progress.step else None,
            rng={"seed": recipe.seed, "each_step": "blake2b(seed:step:rank)"},
            versions={name: version(name) for name in WRITERS},
            saved_at=time.time(),
            reason=reason,
            files={},
        )


def _make_empty(folder: Path) -> None:
    reach("folder.begins")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    reach("folder.made")


def _newest_name(checkpoints: Path) -> str | None:
    present = folders.complete(checkpoints)
    return present[-1].name if present else None


def _attempted(action: Callable[[], object]) -> list[str]:
    """Do it; what the disk or the checkpoint has against it becomes text that can be told to the other ranks."""
    try:
        action()
    except OSError as error:
        return [f"{error.filename or ''}: {error.strerror or error}".removeprefix(": ")]
    except CheckpointError as error:
        return [str(error)]
    return []


def _free_space(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB"
