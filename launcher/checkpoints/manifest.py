"""What a checkpoint says of itself, and what one rank says of its part."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from xxhash import xxh3_128_hexdigest

from launcher.checkpoints.disk import write_durably
from launcher.checkpoints.files import FileRecord, damages
from launcher.errors import CheckpointError
from launcher.planning.layout import BatchPlan, Layout
from launcher.recipe.schema import Recipe

MANIFEST_NAME = "manifest.json"
VERSION: Literal[2] = 2
_FIRST_LINE = re.compile(rb'\{"manifest_xxh3_128": "([0-9a-f]{32})",\n')


class Manifest(BaseModel):
    """Written last into a checkpoint's folder: a folder without it is not a checkpoint.

    The file's first line holds the checksum of the rest of it, so that no byte of a checkpoint is unguarded.

    Attributes:
        version: of this form.
        kind: `deepspeed`, in the engine's own layout; `universal`, converted so that any layout loads it.
        step: optimizer steps completed.
        consumed_samples: samples of the global order already trained on.
        layout: sizes of the parallel groups that saved it.
        batch: of the run, whose global size a resumed run keeps.
        zero_stage: of the engine that saved it.
        partitioning: other settings of DeepSpeed on which it depends which rank holds what.
        precision: of the engine that saved it.
        data_fingerprint: of the prepared data.
        recipe: the run's recipe at that time.
        recipe_hash: of it.
        best_eval_loss: lowest validation loss so far.
        evaluations_without_improvement: for early stopping.
        eval_loss: validation loss measured at this very step, if one was.
        eval_score: what `evaluation.metric_for_best_model` was then, as the loss is: smaller is better.
        rng: how each step's random generators are seeded; no generator's state has to be kept.
        versions: of the libraries that wrote it, by name.
        saved_at: Unix time.
        reason: why it was saved: `interval`, `end`, `stop`, `request`, `convert`, `memory`.
        source: checksum of the manifest that this one was converted from; `None` for what the engine saved.
        files: every file of the folder but this one, by path relative to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[2] = VERSION
    kind: Literal["deepspeed", "universal"] = "deepspeed"
    step: int
    consumed_samples: int
    layout: Layout
    batch: BatchPlan
    zero_stage: int
    partitioning: dict[str, Any] = {}
    precision: str
    data_fingerprint: str
    recipe: Recipe
    recipe_hash: str
    best_eval_loss: float | None
    evaluations_without_improvement: int
    eval_loss: float | None = None
    eval_score: float | None = None
    rng: dict[str, Any]
    versions: dict[str, str]
    saved_at: float
    reason: str
    source: str | None = None
    files: dict[str, FileRecord]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(record.size for record in self.files.values())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest into its folder, durably."""
    body = manifest.model_dump_json(indent=1).removeprefix("{\n").encode()
    first = f'{{"manifest_xxh3_128": "{xxh3_128_hexdigest(body)}",\n'.encode()
    write_durably(folder / MANIFEST_NAME, first + body, "manifest")


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest; the files that it names are not looked at.

    Raises:
        CheckpointError: it is missing, damaged or of another version.
    """
    try:
        content = (folder / MANIFEST_NAME).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {folder}: {MANIFEST_NAME} cannot be read: {error.strerror or error}"
        ) from error
    return parse_manifest(content, str(folder))


def parse_manifest(content: bytes, folder: str) -> Manifest:
    """What a manifest's bytes say.

    Args:
        content: of the file.
        folder: where it stands, for the text of errors.

    Raises:
        CheckpointError: it is damaged or of another version.
    """
    first = _FIRST_LINE.match(content)
    if first is None or xxh3_128_hexdigest(content[first.end() :]) != first[1].decode():
        _refuse_other_version(folder, content)
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST_NAME} is damaged: it does not have its own checksum")
    _refuse_other_version(folder, content)
    fields = json.loads(content)
    del fields["manifest_xxh3_128"]
    try:
        return Manifest.model_validate(fields)
    except ValidationError as error:
        raise CheckpointError(f"checkpoint {folder}: {MANIFEST_NAME} is not of the stated form: {error}") from error


class VersionError(CheckpointError):
    """Another version of ZeroFleet wrote the checkpoint: nothing is wrong with it, but this one cannot read it."""


def _refuse_other_version(folder: str, content: bytes) -> None:
    try:
        version = json.loads(content)["version"]
    except (ValueError, KeyError, TypeError):
        return
    if isinstance(version, int) and version != VERSION:
        newer = version > VERSION
        raise VersionError(
            f"checkpoint {folder}: its manifest has version {version}, and this ZeroFleet reads version {VERSION}: "
            f"{'a newer' if newer else 'an older'} ZeroFleet wrote it; resume with that one, or start a new run with "
            "--run-dir"
        )


def manifest_hash(folder: Path) -> str:
    """Checksum of a checkpoint's manifest, and so of the whole checkpoint."""
    return xxh3_128_hexdigest((folder / MANIFEST_NAME).read_bytes())


def faults_of(folder: Path, *, contents: bool, share: tuple[int, int] = (0, 1)) -> list[str]:
    """Verify a checkpoint.

    Args:
        folder: of the checkpoint.
        contents: compare checksums too, not only sizes.
        share: (index, count): look at this part of the files only; a rank's part holds the files that it wrote itself.

    Returns:
        What is wrong, a line a file; empty for a checkpoint that can be trusted.

    Raises:
        VersionError: another version wrote it, which is no damage.
    """
    try:
        manifest = read_manifest(folder)
    except VersionError:
        raise
    except CheckpointError as error:
        return [str(error).removeprefix(f"checkpoint {folder}: ")]
    index, count = share
    names = [name for name, record in manifest.files.items() if record.rank % count == index]
    wrong = damages(folder, manifest.files, contents=contents, names=names)
    if index == 0:
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
        strangers = sorted(present - set(manifest.files) - {MANIFEST_NAME})
        wrong += [f"{name}: the manifest does not know this file" for name in strangers]
    return wrong


class RankManifest(BaseModel):
    """What one rank wrote into a checkpoint that is not committed yet.

    Attributes:
        rank: that wrote it.
        token: of the save, so that what an earlier attempt left is not taken for this one's.
        files: record by path relative to the checkpoint's folder.
        error: why this rank's part could not be written; `None` when it was.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rank: int
    token: str
    files: dict[str, FileRecord]
    error: str | None = None
