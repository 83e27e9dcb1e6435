from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from launcher.data.packing import Rows, first_fit, make_packer

PAD = 7
documents = st.lists(st.lists(st.integers(10, 10_000), min_size=1, max_size=40), max_size=30)
widths = st.integers(2, 17)


def pack(
    packing: Literal["concat", "first_fit_decreasing", "none"], texts: list[list[int]], width: int, at_once: int = 1000
) -> Rows:
    """Feed documents, `at_once` at a time, and join what comes out."""
    packer = make_packer(packing, width, PAD)
    parts = []
    for start in range(0, len(texts), at_once):
        some = texts[start : start + at_once]
        tokens = np.array([token for text in some for token in text], np.uint32)
        parts.append(packer.add(tokens, np.array([len(text) for text in some], np.int64)))
    parts.append(packer.finish())
    return Rows(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.counts for part in parts]),
        sum(part.truncated for part in parts),
    )


def segments(rows: Rows) -> list[list[list[int]]]:
    """Segments of each row, after checking that the rest of the row is padding."""
    result, lengths = [], iter(rows.lengths.tolist())
    for tokens, count in zip(rows.tokens.tolist(), rows.counts.tolist(), strict=True):
        start, row = 0, []
        for _ in range(count):
            length = next(lengths)
            assert length > 0
            row.append(tokens[start : start + length])
            start += length
        assert tokens[start:] == [PAD] * (len(tokens) - start)
        assert row
        result.append(row)
    assert next(lengths, None) is None
    return result


@given(documents, widths, st.integers(1, 10))
def test_concat_keeps_the_stream_and_fills_every_row_but_the_last(
    texts: list[list[int]], width: int, at_once: int
) -> None:
    rows = pack("concat", texts, width, at_once)
    stream = [token for text in texts for token in text]
    assert [token for row in segments(rows) for segment in row for token in segment] == stream
    assert len(rows.tokens) == -(-len(stream) // width)
    ends = set(np.cumsum([len(text) for text in texts]).tolist()) | set(range(width, len(stream), width))
    assert set(np.cumsum(rows.lengths).tolist()) == ends  # segments end where documents end, and where rows do


@given(documents, widths, st.integers(1, 10))
def test_first_fit_decreasing_keeps_documents_whole(texts: list[list[int]], width: int, at_once: int) -> None:
    rows = pack("first_fit_decreasing", texts, width, at_once)
    pieces = [text[start : start + width] for text in texts for start in range(0, len(text), width)]
    packed = [segment for row in segments(rows) for segment in row]
    assert sorted(packed) == sorted(pieces)
    rooms = [width - sum(map(len, row)) for row in segments(rows)]
    assert all(later[0] and len(later[0]) > room for i, room in enumerate(rooms) for later in segments(rows)[i + 1 :])


@given(documents, widths, st.integers(1, 10))
def test_none_gives_each_document_a_row_and_counts_what_it_cuts(
    texts: list[list[int]], width: int, at_once: int
) -> None:
    rows = pack("none", texts, width, at_once)
    assert segments(rows) == [[text[:width]] for text in texts]
    assert rows.truncated == sum(max(0, len(text) - width) for text in texts)


def naive_first_fit(lengths: list[int], capacity: int) -> list[int]:
    rooms: list[int] = []
    bins = []
    for length in lengths:
        chosen = next((i for i, room in enumerate(rooms) if room >= length), len(rooms))
        if chosen == len(rooms):
            rooms.append(capacity)
        rooms[chosen] -= length
        bins.append(chosen)
    return bins


@given(st.lists(st.integers(1, 50), max_size=100))
def test_first_fit_takes_the_first_bin_with_room(lengths: list[int]) -> None:
    bins, count = first_fit(np.array(lengths, np.int64), 50)
    assert bins.tolist() == naive_first_fit(lengths, 50)
    assert count == len(set(bins.tolist()))


def log_normal_lengths(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).lognormal(5.5, 1.0, count).astype(np.int64) + 1


@pytest.mark.parametrize(("packing", "least"), [("first_fit_decreasing", 0.995), ("concat", 0.999)])
def test_rows_are_nearly_full_on_lengths_like_those_of_web_text(
    packing: Literal["concat", "first_fit_decreasing"], least: float
) -> None:
    lengths = log_normal_lengths(5_000)
    packer = make_packer(packing, 2048, PAD)
    parts = [packer.add(np.ones(lengths.sum(), np.uint32), lengths), packer.finish()]
    used = sum(int(part.lengths.sum()) for part in parts)
    assert used == lengths.sum()
    assert used / sum(part.tokens.size for part in parts) >= least
