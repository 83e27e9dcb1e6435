"""The recipe's sources: found, identified by content, and opened through `datasets` as one column of text."""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from xxhash import xxh3_64_intdigest

from cluster.errors import Problem
from launcher.data.files import FileFacts, find_files, index_path, scan_files
from launcher.errors import SourceError, StorageError
from launcher.recipe.data_sections import (
    AudioFolderSource,
    HubSource,
    ImageFolderSource,
    SavedSource,
    ScikitLearnSource,
    Source,
    TextSource,
)
from launcher.recipe.schema import Recipe

READ_BYTES = 1 << 20
"""Text that is read at once, about; a single document may be larger."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}


@dataclass(frozen=True)
class LocatedSource:
    """A source whose files are known.

    Attributes:
        where: dotted path of its field in the recipe.
        source: the field's value.
        serves: the split it serves; `both` when documents are held out of it by `validation_fraction`.
        files: what it reads, in the order in which documents come.
    """

    where: str
    source: Source
    serves: Literal["train", "validation", "both"]
    files: tuple[FileFacts, ...]

    @property
    def undecodable(self) -> list[str]:
        """Paths of files that are not UTF-8."""
        return [file.path for file in self.files if not file.is_utf8]

    def identity(self) -> list[Any]:
        """What decides its documents, without the paths: the same content elsewhere is the same source."""
        settings = self.source.model_dump(exclude={"files", "exclude", "path", "weight", "revision"})
        identity: list[Any] = [self.serves, settings, [[file.size, file.digest] for file in self.files]]
        return [*identity, [Path(file.path).parent.name for file in self.files]] if self.labels_by_folder else identity

    @property
    def labels_by_folder(self) -> bool:
        """Whether a file's folder is its label."""
        source = self.source
        if isinstance(source, ImageFolderSource | AudioFolderSource):
            return True
        return isinstance(source, TextSource) and source.label_from_folder


def is_held_out(text: bytes, seed: int, fraction: float) -> bool:
    """Decide a document's side of the split from its text alone, so that order and duplicates play no part."""
    return xxh3_64_intdigest(text, seed=seed) < fraction * 2.0**64


def locate_sources(
    recipe: Recipe, cache: Path, on_file: Callable[[int], None] = lambda size: None
) -> list[LocatedSource]:
    """Find and hash the files of all sources, the training ones first.

    Args:
        recipe: its paths are absolute, or relative to the working directory.
        cache: folder in which file hashes are remembered.
        on_file: called with the size of each file dealt with.

    Raises:
        SourceError: lists every missing file, empty glob, unreadable file and file in a wrong encoding.
    """
    data = recipe.data
    holds_out: Literal["train", "both"] = "both" if data.validation_fraction else "train"
    entries: list[tuple[str, Source, Literal["train", "validation", "both"]]] = [
        *((f"data.sources.{index}", source, holds_out) for index, source in enumerate(data.sources)),
        *((f"data.validation_sources.{index}", source, "validation")
          for index, source in enumerate(data.validation_sources)),
    ]  # fmt: skip
    located: list[LocatedSource] = []
    problems: list[Problem] = []
    for where, source, serves in entries:
        paths, wrong = _paths(source)
        field = f"{where}.{'path' if isinstance(source, SavedSource | HubSource) else 'files'}"
        patterns, exclude = _patterns(source)
        facts, unreadable = scan_files(paths, index_path(cache, patterns, exclude), on_file)
        found = LocatedSource(where, source, serves, tuple(facts))
        if source.type in ("json", "jsonl", "csv"):
            unreadable += [
                f"{path} is not UTF-8; convert it, or leave it out with exclude" for path in found.undecodable
            ]
        problems += [Problem(text, field) for text in wrong + unreadable]
        located.append(found)
    if problems:
        raise SourceError(recipe.name, problems)
    return located


def _patterns(source: Source) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What names a source's files, and what leaves some out."""
    if isinstance(source, ScikitLearnSource):
        return (source.name,), ()
    return ((source.path,), ()) if isinstance(source, SavedSource | HubSource) else (source.files, source.exclude)


def _paths(source: Source) -> tuple[list[str], list[str]]:
    """Paths of the files that a source reads, and what is wrong with it."""
    if isinstance(source, HubSource):
        try:
            dataset = _load_hub(source)
        except OSError as error:
            if error.errno in _FULL:
                raise
            return [], [_cannot_load(source, error)]
        except Exception as error:
            return [], [_cannot_load(source, error)]
        return sorted({file["filename"] for file in dataset.cache_files}), []
    if isinstance(source, SavedSource):
        folder = Path(source.path)
        if not folder.is_dir():
            return [], [f"there is no folder {folder}"]
        part = folder / source.split if (folder / "dataset_dict.json").is_file() else folder
        if not (part / "state.json").is_file():
            splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
            has = f"; it holds the splits {', '.join(splits)}" if splits else ""
            return [], [f"{part} was not written by Dataset.save_to_disk{has}"]
        return sorted(str(path) for path in part.iterdir() if path.is_file()), []
    if isinstance(source, ScikitLearnSource):
        return [], []
    return find_files(source.files, source.exclude)


def open_documents(located: LocatedSource, scratch: Path, recipe_name: str) -> Any:
    """Open a source as a `datasets.Dataset` whose one column is its text.

    Args:
        located: the source.
        scratch: folder for Arrow copies of text, JSON, CSV and Parquet files; may go once the documents are read.
        recipe_name: for errors.

    Raises:
        SourceError: `datasets` cannot read the files, or there is no text column; says which columns there are.
        StorageError: the disk is full.
    """
    source = located.source
    if isinstance(source, ImageFolderSource | AudioFolderSource | ScikitLearnSource):
        held = "sounds" if isinstance(source, AudioFolderSource) else "images"
        raise SourceError(
            recipe_name, [Problem(f"type {source.type} holds {held}, but the task reads text", located.where)]
        )
    dataset = open_table(located, scratch, recipe_name)
    column = source.text_column
    problem = None
    if column not in dataset.column_names:
        problem = f"there is no column {column}; the columns are {', '.join(dataset.column_names)}"
    elif getattr(dataset.features[column], "dtype", None) not in ("string", "large_string"):
        problem = f"column {column} holds {dataset.features[column]}, not text"
    if problem is not None:
        raise SourceError(recipe_name, [Problem(problem, f"{located.where}.text_column")])
    return dataset.select_columns([column])


def open_table(located: LocatedSource, scratch: Path, recipe_name: str) -> Any:
    """Open a source as a `datasets.Dataset` with all its columns; see `open_documents`."""
    try:
        return _load(located, scratch)
    except MemoryError:
        raise
    except Exception as error:  # whatever datasets, pyarrow, pandas or the network raise over bad input
        raise_if_full(error, scratch)
        raise SourceError(recipe_name, [Problem(_cannot_load(located.source, error), located.where)]) from error


def _load(located: LocatedSource, scratch: Path) -> Any:
    import datasets

    source = located.source
    with _quiet(datasets):
        if isinstance(source, HubSource):
            return _load_hub(source)
        if isinstance(source, SavedSource):
            loaded = datasets.load_from_disk(source.path)
            return loaded[source.split] if isinstance(loaded, datasets.DatasetDict) else loaded
        options: dict[str, Any] = {}
        if isinstance(source, TextSource):
            # Bytes that are not UTF-8 become U+FFFD; which files had some is known from the scan.
            options = {"sample_by": source.sample_by, "encoding": "utf-8-sig", "encoding_errors": "replace"}
        return datasets.load_dataset(
            "json" if source.type == "jsonl" else source.type,
            data_files=_plain_names(located.files, scratch),
            split="train",
            cache_dir=str(scratch),
            **options,
        )


def _plain_names(files: tuple[FileFacts, ...], scratch: Path) -> list[str]:
    """Paths for `datasets`, which takes every name for a glob and some for a URL: special names get a plain link."""
    names = []
    for index, file in enumerate(files):
        name = file.path
        if any(special in name for special in ("*", "?", "[", "::", "://")):
            link = scratch / f"link_{index:08d}{Path(name).suffix}"
            link.symlink_to(name)
            name = str(link)
        names.append(name)
    return names


def _load_hub(source: HubSource) -> Any:
    import datasets

    with _quiet(datasets):
        return datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Keep `datasets` from drawing bars, and from logging what its exceptions say again."""
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        if not bars:
            datasets.enable_progress_bars()
        datasets.logging.set_verbosity(verbosity)


def _cannot_load(source: Source, error: BaseException) -> str:
    reason = error.__cause__ or error
    text = (str(reason) or type(reason).__name__).strip().splitlines()[0]
    what = source.path if isinstance(source, SavedSource | HubSource) else f"the files as {source.type}"
    return f"datasets cannot load {what}: {text}"


def raise_if_full(error: BaseException, place: Path) -> None:
    """Raise a `StorageError` if a full or read-only disk is behind an exception, however deep."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise StorageError(
                f"prepared data cannot be written under {place}: {cause.strerror or cause}; make room, or name another "
                "folder with data.cache_directory or ZEROFLEET_CACHE"
            ) from error
        cause = cause.__cause__ or cause.__context__


def text_batches(dataset: Any) -> Iterator[list[str | None]]:
    """Read the documents of an opened source in order, about `READ_BYTES` at a time."""
    rows = len(dataset)
    if rows == 0:
        return
    size = int(dataset.data.nbytes) // rows
    for table in dataset.with_format("arrow").iter(batch_size=max(1, min(10_000, READ_BYTES // max(size, 1)))):
        yield table.column(0).to_pylist()
