"""Examples that share rows: conversations are kept whole, and none of them sees or predicts another."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from launcher.data.examples import Example, Field
from launcher.data.packing import first_fit

WINDOW_TOKENS = 1 << 23
"""Examples of about so many tokens are packed at a time (and of 64 rows at least)."""
IGNORED = -100
"""Label of a position that is no target, as in transformers."""
FIELDS = {"input_ids": Field("uint32"), "labels": Field("int32"), "position_ids": Field("int32")}


class ExamplePacker(Protocol):
    """Turns examples into the samples that are kept of them."""

    def add(self, examples: Sequence[Example]) -> list[Example]:
        """Take examples and return the samples that are complete."""
        ...

    def finish(self) -> list[Example]:
        """Return the last samples."""
        ...


class OneASample:
    """Every example by itself."""

    def add(self, examples: Sequence[Example]) -> list[Example]:
        """Return them."""
        return list(examples)

    def finish(self) -> list[Example]:
        """Nothing was held back."""
        return []


class PackedExamples:
    """Examples of `input_ids` and `labels`, packed into rows by first-fit-decreasing.

    Samples have `position_ids` besides, which restart where an example begins: transformers makes a block-diagonal
    causal mask of them (`masking_utils.find_packed_sequence_indices`). The label of an example's first token is
    taken out, for only the example before it could predict it.

    Args:
        length: tokens that fit a row; no example has more.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._held: list[Example] = []
        self._tokens = 0

    def add(self, examples: Sequence[Example]) -> list[Example]:
        """Hold examples until a window is full, then pack it."""
        self._held += examples
        self._tokens += sum(len(example["input_ids"]) for example in examples)
        return [] if self._tokens < max(WINDOW_TOKENS, 64 * self.length) else self.finish()

    def finish(self) -> list[Example]:
        """Pack what is held."""
        held = sorted(self._held, key=lambda example: -len(example["input_ids"]))
        self._held, self._tokens = [], 0
        row_of, rows = first_fit(np.array([len(example["input_ids"]) for example in held], np.int64), self.length)
        members: list[list[Example]] = [[] for _ in range(rows)]
        for row, example in zip(row_of.tolist(), held, strict=True):
            members[row].append(example)
        return [_joined(some) for some in members]


def _joined(examples: Sequence[Example]) -> Example:
    labels = [np.concatenate([[IGNORED], example["labels"][1:]]) for example in examples]
    return {
        "input_ids": np.concatenate([example["input_ids"] for example in examples]),
        "labels": np.concatenate(labels).astype(np.int32),
        "position_ids": np.concatenate([np.arange(len(some), dtype=np.int32) for some in labels]),
    }
