"""Labelled examples on disk: any number of named arrays an example, read by every worker through memory maps.

A folder holds `fields.json` and for each field `NAME.npy`: the values of all examples one after the other, or stacked
where all have one shape; ragged fields have `NAME.offsets.npy` [examples + 1] besides.
"""

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

FIELDS = "fields.json"
Example = dict[str, NDArray[Any]]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Field:
    """Form of one array of an example.

    Attributes:
        dtype: numpy's name of the type.
        shape: of each example's array; `None` for one axis of any length.
    """

    dtype: str
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class BadExample:
    """Why a row is left out."""

    reason: str


class ExampleEncoder(Protocol):
    """How a task turns rows of a source into examples; made from the recipe.

    Attributes:
        roles: what it reads of each row.
        optional_roles: what it reads of the sources that have it.

    Rows that texts alone do not tell apart (pictures with the same caption) have `split_key(row) -> str` besides, which
    then decides whether a row is held out. Where examples may share a sample, `packer() -> ExamplePacker` joins them.
    """

    roles: tuple[str, ...]
    optional_roles: tuple[str, ...]

    def identity(self) -> Any:
        """What decides the examples besides the rows and the tokenizer; of types that JSON knows."""
        ...

    def texts(self, row: Row) -> list[str]:
        """Text of a row: a tokenizer may be trained on it, and it decides whether the row is held out."""
        ...

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Get ready, with a look at all training rows where that is needed.

        Args:
            tokenizer: of transformers; `None` for tasks without text.
            training_rows: all of them, some at a time.

        Raises:
            EncodingError: these rows, or this tokenizer, cannot be used.
        """
        ...

    def fields(self) -> dict[str, Field]:
        """Form of the examples' arrays, after `begin`."""
        ...

    def encode(self, rows: Sequence[Row]) -> Sequence[Example | list[Example] | BadExample]:
        """Turn each row into an example, or several, or say why it is left out.

        Raises:
            EncodingError: a row shows that the recipe does not fit the data.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What the task must know later, of types that JSON knows (the labels, say)."""
        ...


class EncodingError(ValueError):
    """The rows and the recipe do not fit.

    Attributes:
        where: dotted path of the recipe's field to change; empty for the source itself.
    """

    def __init__(self, message: str, where: str = "") -> None:
        super().__init__(message)
        self.where = where


class ExamplesDataset(Sequence[Example]):
    """Examples of one source; pickles as its path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = json.loads((folder / FIELDS).read_text())
        self.rows: int = content["rows"]
        self.fields = {name: Field(**form) for name, form in content["fields"].items()}
        self._values = {name: _map(folder / f"{name}.npy") for name in self.fields}
        self._offsets = {
            name: _map(folder / f"{name}.offsets.npy") for name, field in self.fields.items() if field.shape is None
        }

    def __reduce__(self) -> tuple[type["ExamplesDataset"], tuple[Path]]:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: Any) -> Any:
        """Return example `index`: a copy of each of its arrays, by name."""
        index = range(self.rows)[index]
        example = {}
        for name, values in self._values.items():
            offsets = self._offsets.get(name)
            part = values[index] if offsets is None else values[offsets[index] : offsets[index + 1]]
            example[name] = np.array(part)
        return example


PARTS = "part_*"
"""Folders of a data set that was made in parts, in order."""


class AnnotatedDataset(Sequence[Example]):
    """Samples with further fields, which were made in parts; pickles as its paths.

    Args:
        dataset: the samples.
        folder: holds `part_00000`, ...: examples with the further fields, as many as there are samples.
    """

    def __init__(self, dataset: Sequence[Any], folder: Path) -> None:
        self.dataset = dataset
        self.folder = folder
        self._parts = [ExamplesDataset(part) for part in sorted(folder.glob(PARTS))]
        self._ends = list(np.cumsum([len(part) for part in self._parts]))

    def __reduce__(self) -> tuple[type["AnnotatedDataset"], tuple[Sequence[Any], Path]]:
        return type(self), (self.dataset, self.folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """Return sample `index` with its further fields."""
        index = range(len(self))[index]
        part = bisect_right(self._ends, index)
        first = self._ends[part] - len(self._parts[part])
        return {**self.dataset[index], **self._parts[part][int(index - first)]}


def _map(path: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(path, mmap_mode="r")
    return array
