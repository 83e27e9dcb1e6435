"""The sample order: a function of (seed, epoch, mixture) alone, computed where it is asked for.

No part of it knows of ranks, batches or time, and none of it is stored: which sample stands where is arithmetic,
so a run can be continued at any position, by any number of ranks, without reading what came before.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from launcher.errors import DataError

MIXTURE_BLOCK = 4096
"""Positions over which the shares of a mixture hold exactly; shares are rounded to 1/4096 (0.024 %)."""
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXTURE_STREAM = -1  # in the place of a source index


class GlobalOrder:
    """Which sample stands at each position of the endless training stream.

    Within a source, each epoch is a permutation of its rows, another one every epoch. Several sources are mixed in
    blocks of `MIXTURE_BLOCK` positions: every block holds each source equally often, its share by largest remainder, in
    an order that differs from block to block. Each source goes through its own epochs as it is used.

    Args:
        lengths: rows of each source.
        weights: of the sources, in any unit.
        seed: of the order.
        shuffle: without it, rows come in their stored order, and the sources of a mixture in an even, fixed pattern.

    Raises:
        DataError: a source is empty, or its weight is too small to be in a block at all.
    """

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int, shuffle: bool) -> None:
        if not all(length > 0 for length in lengths):
            raise DataError(f"every source needs samples; the sources have {', '.join(map(str, lengths))}")
        self.lengths = np.array(lengths, np.int64)
        self.seed = seed
        self.shuffle = shuffle
        self.shares = mixture_shares(weights)
        # Source of each slot of a block, evenly spread, and how often that source came before in the block.
        turns = np.concatenate([np.arange(share) for share in self.shares])
        sources = np.repeat(np.arange(len(lengths)), self.shares)
        spread = np.argsort((turns + 0.5) / self.shares[sources], kind="stable")
        self._slot_source, self._slot_turn = sources[spread], turns[spread]

    @property
    def epoch_length(self) -> int:
        """Positions in an epoch: as many as the sources have rows together.

        With one source, or weights in proportion to the sources' sizes, every row comes once; with other weights some
        sources are seen more than once in it and others not whole.
        """
        return int(self.lengths.sum())

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Find the samples at some positions.

        Args:
            positions: int64 [n], from 0, in any order.

        Returns:
            Source, row and epoch of the source, int64 [n] each.
        """
        positions = np.asarray(positions, np.int64)
        sources, ordinals = self._mix(positions)
        epochs, rows = np.divmod(ordinals, self.lengths[sources])
        if self.shuffle:
            for source, length in enumerate(self.lengths.tolist()):
                here = sources == source
                rows[here] = permute(rows[here], length, stream_keys(self.seed, source, epochs[here]))
        return sources, rows, epochs

    def _mix(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source at each position, and the how-manieth of that source it is."""
        if len(self.lengths) == 1:
            return np.zeros_like(positions), positions
        blocks, slots = np.divmod(positions, MIXTURE_BLOCK)
        if self.shuffle:
            slots = permute(slots, MIXTURE_BLOCK, stream_keys(self.seed, _MIXTURE_STREAM, blocks))
        sources = self._slot_source[slots]
        return sources, blocks * self.shares[sources] + self._slot_turn[slots]


def mixture_shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Positions of each source in a block of `MIXTURE_BLOCK`, by largest remainder.

    Raises:
        DataError: a source would never come.
    """
    exact = np.array(weights, np.float64) / np.sum(weights) * MIXTURE_BLOCK
    shares: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    order = np.argsort(shares - exact, kind="stable")
    shares[order[: MIXTURE_BLOCK - int(shares.sum())]] += 1
    if not shares.all():
        raise DataError(
            f"weights {', '.join(f'{weight:g}' for weight in weights)}: a source with less than 1/{MIXTURE_BLOCK} "
            "of the mixture would never be seen; raise its weight or leave it out"
        )
    return shares


def stream_keys(seed: int, source: int, epochs: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Keys of the permutations of a source's epochs, uint64 [n]."""
    key = np.array([seed], np.uint64)
    for part in (np.array([source], np.int64), epochs):
        key = _scramble(key + _GOLDEN) ^ _scramble(part.astype(np.uint64) * _GOLDEN + _GOLDEN)
    return _scramble(key)


def permute(indices: NDArray[np.int64], size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Apply to each index the permutation of `range(size)` that its key names.

    A balanced Feistel network over the smallest even number of bits that holds `size`, and cycle walking for results
    outside (Black and Rogaway 2002): a bijection for any key, computed for one index without the others. From 17
    elements on, the domain is less than 4 x `size`, so a point walks fewer than four times on average. The domain is
    never less than 64: on a smaller one a Feistel network cannot make all permutations alike (the tests count them).

    Args:
        indices: int64 [n], each below `size`.
        size: number of elements.
        keys: uint64 [n].

    Returns:
        int64 [n], each below `size`.
    """
    if size == 1:
        return np.zeros_like(indices)
    half = np.uint64(max(3, ((size - 1).bit_length() + 1) // 2))
    points = indices.astype(np.uint64)
    outside = np.ones(len(points), np.bool_)
    while outside.any():
        points[outside] = _feistel(points[outside], half, keys[outside])
        outside = points >= np.uint64(size)
    return points.astype(np.int64)


def _feistel(points: NDArray[np.uint64], half: np.uint64, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = points >> half, points & mask
    for _ in range(_ROUNDS):
        keys = keys + _GOLDEN
        left, right = right, left ^ (_scramble(_scramble(keys) ^ right) & mask)
    return (left << half) | right


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def evaluation_rows(lengths: Sequence[int], max_samples: int | None) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the validation samples: all of them in stored order, or `max_samples` spread evenly over all of them.

    Spread, because the first ones would all come from one source, from its first files, or be its longest documents.

    Args:
        lengths: rows of each validation source.
        max_samples: at most so many; `None` for all.

    Returns:
        Source and row of each chosen sample, int64 [n] each.
    """
    total = sum(lengths)
    chosen = total if max_samples is None else min(total, max_samples)
    positions = np.arange(chosen) * total // max(chosen, 1)
    ends = np.cumsum(np.array(lengths, np.int64))
    sources = np.searchsorted(ends, positions, side="right")
    return sources.astype(np.int64), positions - (ends - np.array(lengths, np.int64))[sources] if total else positions
