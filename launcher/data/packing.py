"""Documents to rows of `sequence_length` tokens.

A packer is fed documents in order and gives out full rows as they fill; what it holds back is bounded.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

WINDOW_TOKENS = 1 << 23
"""First-fit-decreasing looks at about so many tokens of documents at a time (and at 64 rows' worth at least)."""


@dataclass(frozen=True)
class Rows:
    """Packed rows.

    Attributes:
        tokens: uint32 [rows, sequence_length], padded at the end of each row.
        lengths: int32 [segments], tokens of each document (or piece of one), row by row.
        counts: int64 [rows], segments in each row.
        truncated: tokens that were dropped from the ends of documents.
    """

    tokens: NDArray[np.uint32]
    lengths: NDArray[np.int32]
    counts: NDArray[np.int64]
    truncated: int = 0


class Packer(Protocol):
    """Turns documents into rows."""

    def add(self, tokens: NDArray[np.uint32], lengths: NDArray[np.int64]) -> Rows:
        """Take documents, one after the other in `tokens`, and return the rows that are now full."""
        ...

    def finish(self) -> Rows:
        """Return the last rows."""
        ...


def make_packer(
    packing: Literal["concat", "first_fit_decreasing", "none"], sequence_length: int, filler: int
) -> Packer:
    """Return the packer that a recipe's `data.packing` names."""
    if packing == "concat":
        return ConcatPacker(sequence_length, filler)
    if packing == "first_fit_decreasing":
        return FirstFitDecreasingPacker(sequence_length, filler)
    return SingleDocumentPacker(sequence_length, filler)


class ConcatPacker:
    """One stream of documents, cut every `sequence_length` tokens: every row but the last is full."""

    def __init__(self, sequence_length: int, filler: int) -> None:
        self.sequence_length = sequence_length
        self.filler = filler
        self._tokens = np.empty(0, np.uint32)
        self._ends = np.empty(0, np.int64)  # where documents end in _tokens, as offsets

    def add(self, tokens: NDArray[np.uint32], lengths: NDArray[np.int64]) -> Rows:
        """Append documents to the stream and cut off its full rows."""
        self._ends = np.concatenate([self._ends, len(self._tokens) + np.cumsum(lengths)])
        self._tokens = np.concatenate([self._tokens, tokens])
        return self._take(len(self._tokens) // self.sequence_length)

    def finish(self) -> Rows:
        """Pad what is left to a row."""
        remainder = len(self._tokens)
        if not remainder:
            return self._take(0)
        fill = np.full(self.sequence_length - remainder, self.filler, np.uint32)
        self._tokens = np.concatenate([self._tokens, fill])
        return self._take(1, remainder)

    def _take(self, rows: int, content: int | None = None) -> Rows:
        width = rows * self.sequence_length
        content = width if content is None else content
        row_ends = np.arange(1, rows + 1) * self.sequence_length
        boundaries = np.union1d(self._ends, row_ends)
        boundaries = np.minimum(boundaries[boundaries <= width], content)
        boundaries = np.unique(boundaries)
        tokens = self._tokens[:width].reshape(rows, self.sequence_length)
        self._tokens = self._tokens[width:].copy()
        self._ends = self._ends[self._ends > width] - width
        lengths = np.diff(boundaries, prepend=0).astype(np.int32)
        counts = np.bincount((boundaries - 1) // self.sequence_length, minlength=rows)
        return Rows(tokens, lengths, counts.astype(np.int64))


class SingleDocumentPacker:
    """One document a row, cut at `sequence_length`; the rest of it is dropped."""

    def __init__(self, sequence_length: int, filler: int) -> None:
        self.sequence_length = sequence_length
        self.filler = filler

    def add(self, tokens: NDArray[np.uint32], lengths: NDArray[np.int64]) -> Rows:
        """Give each document its row."""
        kept = np.minimum(lengths, self.sequence_length)
        starts = np.cumsum(lengths) - lengths
        rows = _rows(tokens, starts, kept, np.arange(len(lengths)), len(lengths), self.sequence_length, self.filler)
        return Rows(rows.tokens, rows.lengths, rows.counts, int((lengths - kept).sum()))

    def finish(self) -> Rows:
        """Nothing was held back."""
        return self.add(np.empty(0, np.uint32), np.empty(0, np.int64))


class FirstFitDecreasingPacker:
    """Documents kept whole where they fit: longest first, each into the first row with room.

    Works on windows of about `WINDOW_TOKENS`, so that memory is bounded and rows are ready early. A document
    longer than a row is first cut into full rows and a rest. First-fit-decreasing needs at most 11/9 of the rows that
    the best packing needs, plus one (Johnson 1973); on text it leaves well under 1 % of padding.
    """

    def __init__(self, sequence_length: int, filler: int) -> None:
        self.sequence_length = sequence_length
        self.filler = filler
        self._tokens: list[NDArray[np.uint32]] = []
        self._pieces: list[NDArray[np.int64]] = []
        self._held = 0

    def add(self, tokens: NDArray[np.uint32], lengths: NDArray[np.int64]) -> Rows:
        """Hold documents until a window is full, then pack it."""
        self._tokens.append(tokens)
        self._pieces.append(_pieces(lengths, self.sequence_length))
        self._held += len(tokens)
        if self._held < max(WINDOW_TOKENS, 64 * self.sequence_length):
            return self._pack(np.empty(0, np.uint32), np.empty(0, np.int64))
        return self.finish()

    def finish(self) -> Rows:
        """Pack what is held."""
        tokens = np.concatenate([*self._tokens, np.empty(0, np.uint32)])
        pieces = np.concatenate([*self._pieces, np.empty(0, np.int64)])
        self._tokens, self._pieces, self._held = [], [], 0
        return self._pack(tokens, pieces)

    def _pack(self, tokens: NDArray[np.uint32], lengths: NDArray[np.int64]) -> Rows:
        longest_first = np.argsort(-lengths, kind="stable")
        row_of, rows = first_fit(lengths[longest_first], self.sequence_length)
        by_row = np.argsort(row_of, kind="stable")
        order = longest_first[by_row]
        starts = (np.cumsum(lengths) - lengths)[order]
        return _rows(tokens, starts, lengths[order], row_of[by_row], rows, self.sequence_length, self.filler)


def _pieces(lengths: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
    """Cut documents longer than a row: lengths of the pieces, in order."""
    full, rest = np.divmod(lengths, sequence_length)
    counts = full + (rest > 0)
    pieces = np.full(counts.sum(), sequence_length, np.int64)
    lasts = np.cumsum(counts) - 1
    pieces[lasts[rest > 0]] = rest[rest > 0]
    return pieces


def first_fit(lengths: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], int]:
    """Put each item into the first bin with room for it, opening bins as needed.

    A tree of the largest room under each node finds that bin in O(log bins).

    Args:
        lengths: int64 [items], each at most `capacity`.
        capacity: room of an empty bin.

    Returns:
        The bin of each item, int64 [items], and the number of bins.
    """
    leaves = 1
    while leaves < len(lengths):
        leaves *= 2
    room = [capacity] * (2 * leaves)
    bins = np.empty(len(lengths), np.int64)
    for item, length in enumerate(lengths.tolist()):
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < length:
                node += 1
        bins[item] = node - leaves
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins, int(bins.max(initial=-1)) + 1


def _rows(
    tokens: NDArray[np.uint32],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    row_of: NDArray[np.int64],
    rows: int,
    sequence_length: int,
    filler: int,
) -> Rows:
    """Copy segments, sorted by their row, into padded rows."""
    counts = np.bincount(row_of, minlength=rows).astype(np.int64)
    ends = np.cumsum(lengths)
    before_row = np.concatenate([[0], ends])[np.cumsum(counts) - counts]  # segment tokens in all rows before
    targets = row_of * sequence_length + (ends - lengths) - before_row[row_of]
    offsets = np.arange(lengths.sum()) - np.repeat(ends - lengths, lengths)
    out = np.full(rows * sequence_length, filler, np.uint32)
    out[np.repeat(targets, lengths) + offsets] = tokens[np.repeat(starts, lengths) + offsets]
    return Rows(out.reshape(rows, sequence_length), lengths.astype(np.int32), counts)
