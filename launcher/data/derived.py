"""What a model says of prepared data, computed once: a folder of its own in the cache, which adds to the data's.

Such folders are made in parts that survive a kill: the next attempt goes on after the last whole part.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from xxhash import xxh3_128_hexdigest

from launcher.data.cache import cache_directory, only_one, sync
from launcher.data.examples import AnnotatedDataset, Example, Field
from launcher.data.prepare_examples import ExamplesWriter
from launcher.data.progress import ProgressReporter
from launcher.data.sources import raise_if_full
from launcher.data.store import BASE, PreparedData, Split, is_complete, split_folder, write_marker
from launcher.errors import StorageError
from launcher.recipe.schema import Recipe

FORMAT = 1
"""Of derived folders; part of the fingerprint."""
ROWS_PER_PART = 1024
"""Samples that are asked for between two moments at which a kill costs nothing."""
UNFINISHED = ".unfinished"


class Derivation(Protocol):
    """Something to compute from prepared data with a model.

    Attributes:
        name: what it is, for people.
    """

    name: str

    def identity(self) -> Any:
        """What decides it besides the data; of types that JSON knows."""
        ...

    def size(self) -> int:
        """Bytes it will take, about."""
        ...

    def build(self, folder: Path, reporter: ProgressReporter) -> list[str]:
        """Write it, going on where an earlier attempt was ended; returns notes for people."""
        ...


class Annotator(Protocol):
    """Further fields of each sample.

    Attributes:
        name: what they are, for people.
        splits: of whose samples.
        prepared: the data.
    """

    name: str
    splits: tuple[Split, ...]
    prepared: PreparedData

    def identity(self) -> Any:
        """What decides them besides the data; of types that JSON knows."""
        ...

    def fields(self) -> dict[str, Field]:
        """Their form."""
        ...

    def bytes_of(self, dataset: Sequence[Any]) -> int:
        """Bytes they will take for one source's samples, about."""
        ...

    def annotate(self, dataset: Sequence[Any], rows: range) -> list[Example]:
        """Compute the fields of some samples."""
        ...

    def notes(self, datasets: Sequence[Sequence[Any]]) -> list[str]:
        """What a person should know of the result, given the training samples with their new fields."""
        ...


class Annotations:
    """The derivation that an annotator describes: `SPLIT/source_00/part_00000`, ..."""

    def __init__(self, annotator: Annotator) -> None:
        self.annotator = annotator
        self.name = annotator.name

    def identity(self) -> Any:
        """The annotator's."""
        return self.annotator.identity()

    def size(self) -> int:
        """Over all splits and sources."""
        prepared, annotator = self.annotator.prepared, self.annotator
        return sum(annotator.bytes_of(dataset) for split in annotator.splits for dataset in prepared.split(split))

    def build(self, folder: Path, reporter: ProgressReporter) -> list[str]:
        """Write every part that is not there yet."""
        for split in self.annotator.splits:
            for source, dataset in enumerate(self.annotator.prepared.split(split)):
                target = split_folder(folder, split, source)
                target.mkdir(parents=True, exist_ok=True)
                with reporter.stage(f"{self.name}: {split} {source}", len(dataset), "samples") as advance:
                    for part, first in enumerate(range(0, len(dataset), ROWS_PER_PART)):
                        rows = range(first, min(first + ROWS_PER_PART, len(dataset)))
                        self._write(target / f"part_{part:06d}", dataset, rows)
                        advance(len(rows))
        sources = enumerate(self.annotator.prepared.split("train"))
        return self.annotator.notes(
            [AnnotatedDataset(dataset, split_folder(folder, "train", source)) for source, dataset in sources]
        )

    def _write(self, target: Path, dataset: Sequence[Any], rows: range) -> None:
        if target.exists():
            return
        incomplete = target.with_name(f".{target.name}")
        shutil.rmtree(incomplete, ignore_errors=True)
        writer = ExamplesWriter(incomplete, self.annotator.fields())
        writer.append(self.annotator.annotate(dataset, rows))
        writer.close()
        for path in incomplete.iterdir():
            sync(path)
        incomplete.rename(target)


def derive(recipe: Recipe, prepared: PreparedData, derivation: Derivation, reporter: ProgressReporter) -> PreparedData:
    """Compute something that adds to prepared data, unless it is in the cache already.

    Safe to call from several processes at once, and to kill at any moment.

    Args:
        recipe: names the cache.
        prepared: the data.
        derivation: what to compute.
        reporter: told how far it is.

    Returns:
        The data with it.

    Raises:
        StorageError: the disk has no room for it.
    """
    cache = cache_directory(recipe)
    identity = [FORMAT, prepared.fingerprint, derivation.name, derivation.identity()]
    name = xxh3_128_hexdigest(json.dumps(identity, sort_keys=True).encode())
    directory = cache / name
    if not is_complete(directory):
        with only_one(cache, name, lambda: reporter.say(f"another process computes {derivation.name}; waiting for it")):
            if not is_complete(directory):
                try:
                    _build(directory, prepared, derivation, reporter)
                except OSError as error:
                    raise_if_full(error, cache)
                    raise
    return PreparedData.load(directory)


def _build(directory: Path, prepared: PreparedData, derivation: Derivation, reporter: ProgressReporter) -> None:
    folder = directory.with_name(f"{directory.name}{UNFINISHED}")
    folder.mkdir(exist_ok=True)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    size, free = derivation.size(), shutil.disk_usage(folder).free
    if size - there > free:
        raise StorageError(
            f"{derivation.name} would take about {_mebibytes(size)} in {directory.parent}, where {_mebibytes(free)} "
            "are free; name another folder with data.cache_directory or ZEROFLEET_CACHE"
        )
    reporter.say(f"{derivation.name}: about {_mebibytes(size)} in the cache")
    notes = derivation.build(folder, reporter)
    statistics = {**prepared.statistics, "notes": [*prepared.statistics["notes"], *notes]}
    write_marker(folder, directory.name, {**prepared.settings, BASE: prepared.directory.name}, statistics)
    for path in folder.rglob("*"):
        sync(path)
    shutil.rmtree(directory, ignore_errors=True)
    folder.rename(directory)
    sync(directory.parent)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
