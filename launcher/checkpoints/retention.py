"""Which checkpoints are kept. The decision is a pure function; deleting survives a crash and two deleters at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.checkpoints import folders
from launcher.checkpoints.manifest import Manifest, faults_of, read_manifest
from launcher.errors import CheckpointError
from launcher.recipe.run_sections import CheckpointSection

PIN = ".pinned"


@dataclass(frozen=True)
class Candidate:
    """What the decision looks at in a checkpoint.

    Attributes:
        step: of the checkpoint.
        eval_loss: validation loss (or the metric that is watched, smaller is better) at that step, if it was measured.
        pinned: a person wants it kept.
        trusted: its manifest reads well and its files have their sizes.
    """

    step: int
    eval_loss: float | None = None
    pinned: bool = False
    trusted: bool = True


def to_prune(candidates: Sequence[Candidate], section: CheckpointSection) -> list[int]:
    """Decide which checkpoints go.

    Kept are the newest `save_total_limit`, besides them every one whose step `keep_every` divides, the `keep_best` of
    lowest validation loss and the pinned ones, and always the newest that can be trusted.

    Args:
        candidates: all checkpoints of a run, in any order.
        section: `checkpoint` of the recipe.

    Returns:
        Steps of those to delete, ascending.
    """
    if section.save_total_limit is None:
        return []
    by_step = sorted(candidates, key=lambda candidate: candidate.step)
    kept = {candidate.step for candidate in by_step[-section.save_total_limit :]}
    kept |= {candidate.step for candidate in [c for c in by_step if c.trusted][-1:]}
    kept |= {candidate.step for candidate in by_step if candidate.pinned}
    if section.keep_every is not None:
        kept |= {candidate.step for candidate in by_step if candidate.step % section.keep_every == 0}
    measured = [candidate for candidate in by_step if candidate.eval_loss is not None]
    measured.sort(key=lambda candidate: (candidate.eval_loss, -candidate.step))
    kept |= {candidate.step for candidate in measured[: section.keep_best]}
    return [candidate.step for candidate in by_step if candidate.step not in kept]


def score_of(manifest: Manifest) -> float | None:
    """What the best checkpoints are chosen by, smaller is better: the watched metric, or else the validation loss."""
    return manifest.eval_loss if manifest.eval_score is None else manifest.eval_score


def candidate_of(folder: Path) -> Candidate:
    """Look at a checkpoint's manifest and at the sizes of its files."""
    step = folders.step_of(folder)
    try:
        manifest = read_manifest(folder)
        loss = score_of(manifest)
        trusted = not faults_of(folder, contents=False)
    except CheckpointError:
        return Candidate(step, None, is_pinned(folder), trusted=False)
    return Candidate(step, loss, is_pinned(folder), trusted)


def prune(checkpoints: Path, section: CheckpointSection) -> list[str]:
    """Delete what the recipe does not keep, and converted forms that no resume will ask for.

    Returns:
        Names of what this call deleted.
    """
    present = folders.complete(checkpoints)
    going = set(to_prune([candidate_of(folder) for folder in present], section))
    deleted = []
    for folder in present:
        if folders.step_of(folder) in going and folders.delete(folder, "prune"):
            deleted.append(folder.name)
    newest = present[-1:]
    for folder in folders.converted(checkpoints):
        parent = folder.with_name(folder.name.removesuffix(folders.UNIVERSAL))
        if parent not in newest and not is_pinned(parent) and folders.delete(folder, "prune"):
            deleted.append(folder.name)
    return deleted


def _pin_of(folder: Path) -> Path:
    return folder.with_name(folder.name + PIN)


def is_pinned(folder: Path) -> bool:
    """Whether a person wants this checkpoint kept."""
    return _pin_of(folder).exists()


def pin(folder: Path) -> None:
    """Keep a checkpoint whatever the recipe says."""
    _pin_of(folder).touch()


def unpin(folder: Path) -> None:
    """Let the recipe decide about it again."""
    _pin_of(folder).unlink(missing_ok=True)
