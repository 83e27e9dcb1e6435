"""Prepared data on disk: rows of tokens in memory maps, read by every worker; no `datasets` and no tokenizer here.

A prepared folder holds, for each split and source, three numpy arrays: `tokens.npy` [rows, sequence_length] (uint16 or
uint32, padded at the end of a row), `offsets.npy` [rows + 1] and `lengths.npy` [segments]: row i holds segments of
`lengths[offsets[i]:offsets[i + 1]]` tokens, and what is left of it is padding.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import BufferedWriter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from launcher.data.examples import FIELDS, AnnotatedDataset, ExamplesDataset
from launcher.data.packing import Rows
from launcher.data.sampler import evaluation_rows
from launcher.errors import DataError

BASE = "base"
"""Setting of a folder that adds to another one: that one's name, in the same cache."""
IMPORTANCE = "importance.safetensors"
MARKER = "prepared.json"
TOKENIZER = "tokenizer"
UNIGRAM_COUNTS = "unigram_counts.npy"
IGNORED = -100
"""Label of a position that is no target, as in transformers."""

Split = Literal["train", "validation"]
SampleDict = dict[str, NDArray[np.int64]]


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the narrowest of uint16 and uint32 that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def split_folder(directory: Path, split: Split, source: int) -> Path:
    """Folder of one source's rows."""
    return directory / split / f"source_{source:02d}"


class GrowingArray:
    """A `.npy` file whose first axis grows.

    numpy leaves room in the header for a longer first axis, so the header is written again, in place, at the end.
    """

    def __init__(self, path: Path, dtype: DTypeLike, row_shape: tuple[int, ...] = ()) -> None:
        self.dtype = np.dtype(dtype)
        self.row_shape = row_shape
        self.rows = 0
        self._stream: BufferedWriter = path.open("wb")
        self._header_bytes = self._write_header()

    def append(self, rows: NDArray[Any]) -> None:
        """Add rows at the end."""
        self._stream.write(np.ascontiguousarray(rows, self.dtype).data)
        self.rows += len(rows)

    def close(self) -> None:
        """Write the number of rows into the header, and everything to the disk."""
        with self._stream:
            self._stream.seek(0)
            if self._write_header() != self._header_bytes:
                raise AssertionError("numpy's header grew over the data")
            self._stream.flush()
            os.fsync(self._stream.fileno())

    def abandon(self) -> None:
        """Close the file as it is, if it is not closed yet."""
        with suppress(OSError):  # what is still buffered cannot be written where the disk is full
            self._stream.close()

    def _write_header(self) -> int:
        shape = (self.rows, *self.row_shape)
        np.lib.format.write_array_header_1_0(
            self._stream, {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": shape}
        )
        return self._stream.tell()


class RowsWriter:
    """Writes one source's rows of one split."""

    def __init__(self, folder: Path, sequence_length: int, dtype: DTypeLike) -> None:
        folder.mkdir(parents=True)
        self.tokens = GrowingArray(folder / "tokens.npy", dtype, (sequence_length,))
        self.lengths = GrowingArray(folder / "lengths.npy", np.int32)
        self.offsets = GrowingArray(folder / "offsets.npy", np.int64)
        self.offsets.append(np.zeros(1, np.int64))
        self.num_tokens = 0

    def append(self, rows: Rows) -> None:
        """Add rows."""
        self.tokens.append(rows.tokens)
        self.offsets.append(self.lengths.rows + np.cumsum(rows.counts))
        self.lengths.append(rows.lengths)
        self.num_tokens += int(rows.lengths.sum())

    def close(self) -> None:
        """Complete the files."""
        for array in (self.tokens, self.lengths, self.offsets):
            array.close()

    def abandon(self) -> None:
        """Close the files as they are, if they are not closed yet."""
        for array in (self.tokens, self.lengths, self.offsets):
            array.abandon()


class PackedDataset(Sequence[SampleDict]):
    """Rows of one source as samples; pickles as its path.

    Args:
        folder: holds `tokens.npy`, `offsets.npy` and `lengths.npy`.
        cross_document_attention: let documents of a row see one another.
    """

    def __init__(self, folder: Path, cross_document_attention: bool) -> None:
        self.folder = folder
        self.cross_document_attention = cross_document_attention
        self.tokens, self.offsets, self.lengths = (
            _map(folder / f"{name}.npy") for name in ("tokens", "offsets", "lengths")
        )
        self.sequence_length = int(self.tokens.shape[1])

    def __reduce__(self) -> tuple[type["PackedDataset"], tuple[Path, bool]]:
        return type(self), (self.folder, self.cross_document_attention)

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    def __getitem__(self, index: Any) -> Any:
        """Return row `index`: `input_ids`, `labels` and `position_ids`, int64 [sequence_length] each.

        Labels are not shifted: a model that predicts `labels[t + 1]` from position t never predicts padding, nor
        (unless documents may attend to each other) a document's first token from the document before it. Position ids
        restart at each document and at the padding, from which transformers derives the attention mask; with
        `cross_document_attention` they run through the row.
        """
        index = range(len(self))[index]
        input_ids = self.tokens[index].astype(np.int64)
        lengths = self.lengths[self.offsets[index] : self.offsets[index + 1]].astype(np.int64)
        ends = np.cumsum(lengths)
        content = int(ends[-1])
        labels = input_ids.copy()
        labels[content:] = IGNORED
        position_ids = np.arange(self.sequence_length)
        if not self.cross_document_attention:
            starts = ends - lengths
            labels[starts] = IGNORED
            position_ids[:content] -= np.repeat(starts, lengths)
            position_ids[content:] -= content
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def _map(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r")
    return array


@dataclass(frozen=True)
class PreparedData:
    """Tokenised and packed data, complete on disk.

    Attributes:
        directory: the folder.
        fingerprint: of the content of the files, the tokenizer and the settings that made it.
        settings: `sequence_length`, `cross_document_attention`, `vocab_size`, `eos_token_id`, ...
        statistics: counts of documents, tokens and sequences, overall (`train`, `validation`) and by source
            (`sources`), and `notes` in words.
    """

    directory: Path
    fingerprint: str
    settings: dict[str, Any]
    statistics: dict[str, Any]

    @classmethod
    def load(cls, directory: Path) -> "PreparedData":
        """Open a prepared folder.

        Raises:
            DataError: it is not there, or not complete.
        """
        try:
            content = json.loads((directory / MARKER).read_bytes())
            wrong = [name for name, size in content["files"].items() if (directory / name).stat().st_size != size]
            if wrong:
                raise ValueError(f"{', '.join(wrong)} cut off")
            return cls(directory, content["fingerprint"], content["settings"], content["statistics"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"there is no prepared data in {directory} ({error}); run `zerofleet prepare` again"
            ) from error

    @cached_property
    def base(self) -> "PreparedData | None":
        """The data that this folder adds something to; `None` for data that stands by itself.

        Raises:
            DataError: it is not there any more.
        """
        name = self.settings.get(BASE)
        return None if name is None else PreparedData.load(self.directory.parent / name)

    @property
    def rows_directory(self) -> Path:
        """The folder that holds samples and tokenizer."""
        return self.directory if self.base is None else self.base.rows_directory

    @property
    def tokenizer_directory(self) -> Path:
        """Folder of the tokenizer, for `AutoTokenizer.from_pretrained`."""
        return self.rows_directory / TOKENIZER

    @property
    def importance(self) -> Path | None:
        """How much each weight matters to an earlier task (`optimizer.ewc`), a tensor a parameter; `None` without."""
        own = self.directory / IMPORTANCE
        return own if own.exists() else None if self.base is None else self.base.importance

    @property
    def facts(self) -> dict[str, Any]:
        """What the task's encoder learnt from the data, and where the tokenizer is; empty for packed text."""
        facts: dict[str, Any] = self.settings.get("facts", {})
        return {**facts, "tokenizer_directory": str(self.tokenizer_directory)} if self.holds_examples else facts

    @property
    def holds_examples(self) -> bool:
        """Whether samples are labelled examples, not rows of packed text."""
        return "facts" in self.settings

    def split(self, name: Split) -> list[Any]:
        """Return one data set a source, in the order of the recipe; an empty list when nothing is held out.

        Packed rows (`PackedDataset`) or labelled examples (`ExamplesDataset`).
        """
        folders = sorted((self.directory / name).glob("source_*"))
        if self.base is not None:
            datasets = self.base.split(name)
            return [AnnotatedDataset(*pair) for pair in zip(datasets, folders, strict=True)] if folders else datasets
        if self.holds_examples:
            return [ExamplesDataset(folder) for folder in folders if (folder / FIELDS).exists()]
        return [PackedDataset(folder, self.settings["cross_document_attention"]) for folder in folders]


def unigram_loss(prepared: PreparedData, max_samples: int | None) -> float:
    """Loss of a model that knows only how often each token occurs in the training data.

    The cross-entropy, in nats a token, of the validation targets that evaluation counts (labels after the shift that
    are not ignored, of the same samples) under the training tokens' counts with one added to each (Laplace smoothing).
    A trained model must be below it. Tokens of all sources count alike, whatever the weights of the mixture.

    Args:
        prepared: has a validation split.
        max_samples: as in `evaluation.max_eval_samples`.

    Raises:
        DataError: there are no validation targets.
    """
    counts = np.load(prepared.rows_directory / UNIGRAM_COUNTS).astype(np.float64) + 1
    nats = np.log(counts.sum()) - np.log(counts)
    datasets = prepared.split("validation")
    total, targets = 0.0, 0
    for source, row in zip(*evaluation_rows([len(dataset) for dataset in datasets], max_samples), strict=True):
        labels = datasets[source][row]["labels"][1:]
        labels = labels[labels != IGNORED]
        total += float(nats[labels].sum())
        targets += len(labels)
    if not targets:
        raise DataError("the validation data holds nothing to predict: no document has two tokens")
    return total / targets


def write_marker(directory: Path, fingerprint: str, settings: dict[str, Any], statistics: dict[str, Any]) -> None:
    """Write the file that makes a folder complete; it knows the size of every other file."""
    files = {
        str(path.relative_to(directory)): path.stat().st_size for path in sorted(directory.rglob("*")) if path.is_file()
    }
    content = {"fingerprint": fingerprint, "settings": settings, "statistics": statistics, "files": files}
    (directory / MARKER).write_text(json.dumps(content, indent=1) + "\n")


def is_complete(directory: Path) -> bool:
    """Tell whether a prepared folder is there and whole."""
    try:
        PreparedData.load(directory)
    except DataError:
        return False
    return True
