import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from launcher.data.sampler import MIXTURE_BLOCK, GlobalOrder, evaluation_rows, mixture_shares, permute, stream_keys
from launcher.errors import DataError

seeds = st.integers(0, 2**63 - 1)


def everything(order: GlobalOrder, count: int, start: int = 0) -> NDArray[np.int64]:
    """Samples at `count` positions, int64 [count, 3]."""
    return np.stack(order.locate(np.arange(start, start + count)), axis=1)


@given(st.integers(1, 3000), seeds, st.integers(0, 2**40))
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    keys = np.repeat(stream_keys(seed, 0, np.array([epoch])), size)
    assert sorted(permute(np.arange(size), size, keys).tolist()) == list(range(size))


@given(st.integers(1, 2**62), seeds, st.data())
def test_permute_stays_in_range_and_keeps_points_apart_at_any_size(size: int, seed: int, data: st.DataObject) -> None:
    indices = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True))
    keys = np.repeat(stream_keys(seed, 0, np.array([0])), len(indices))
    images = permute(np.array(indices), size, keys).tolist()
    assert all(0 <= image < size for image in images)
    assert len(set(images)) == len(indices)


@given(st.integers(1, 400), seeds, st.integers(0, 3))
def test_one_source_gives_every_row_once_an_epoch(length: int, seed: int, epoch: int) -> None:
    order = GlobalOrder([length], [1.0], seed, shuffle=True)
    samples = everything(order, length, epoch * length)
    assert sorted(samples[:, 1].tolist()) == list(range(length))
    assert set(samples[:, 2].tolist()) == {epoch}
    assert order.epoch_length == length


def test_epochs_and_seeds_differ() -> None:
    first, second = everything(GlobalOrder([500], [1], 1, shuffle=True), 1000).reshape(2, 500, 3)
    other = everything(GlobalOrder([500], [1], 2, shuffle=True), 500)
    for one, two in ((first, second), (first, other)):
        assert (one[:, 1] == two[:, 1]).sum() < 10  # one coincidence in 500 is expected


@settings(max_examples=20)
@given(
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0.01, 1.0)), min_size=2, max_size=5),
    seeds,
    st.integers(0, 50),
    st.booleans(),
)
def test_every_block_of_a_mixture_holds_the_shares(
    sources: list[tuple[int, float]], seed: int, block: int, shuffle: bool
) -> None:
    lengths, weights = zip(*sources, strict=True)
    order = GlobalOrder(lengths, weights, seed, shuffle)
    samples = everything(order, MIXTURE_BLOCK, block * MIXTURE_BLOCK)
    counts = np.bincount(samples[:, 0], minlength=len(lengths))
    exact = np.array(weights) / sum(weights) * MIXTURE_BLOCK
    assert counts.sum() == MIXTURE_BLOCK
    assert (np.abs(counts - exact) < 1).all()


@pytest.mark.parametrize("shuffle", [True, False])
def test_each_source_of_a_mixture_goes_through_its_own_epochs(shuffle: bool) -> None:
    lengths = [MIXTURE_BLOCK // 8, 1000]
    order = GlobalOrder(lengths, [3, 1], 0, shuffle)
    samples = everything(order, 4 * MIXTURE_BLOCK)
    for source, length in enumerate(lengths):
        mine = samples[samples[:, 0] == source]
        for epoch in range(len(mine) // length):
            assert sorted(mine[mine[:, 2] == epoch, 1].tolist()) == list(range(length))
    assert order.epoch_length == sum(lengths)


@settings(max_examples=30)
@given(seeds, st.lists(st.integers(0, 10**15), min_size=1, max_size=50), st.booleans())
def test_a_sample_does_not_depend_on_how_it_is_asked_for(seed: int, positions: list[int], shuffle: bool) -> None:
    order = GlobalOrder([17, 40_000, 3], [0.2, 0.7, 0.1], seed, shuffle)
    together = np.stack(order.locate(np.array(positions)), axis=1)
    alone = [np.stack(order.locate(np.array([position])), axis=1)[0] for position in positions]
    again = GlobalOrder([17, 40_000, 3], [0.2, 0.7, 0.1], seed, shuffle)
    backwards = np.stack(again.locate(np.array(positions[::-1])), axis=1)[::-1]
    assert together.tolist() == np.array(alone).tolist() == backwards.tolist()


def test_without_shuffling_rows_come_in_order_and_sources_take_turns() -> None:
    assert everything(GlobalOrder([4], [1], 0, shuffle=False), 6).tolist() == [
        [0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 3, 0], [0, 0, 1], [0, 1, 1],
    ]  # fmt: skip
    mixed = everything(GlobalOrder([100, 100], [1, 1], 0, shuffle=False), 6)
    assert mixed[:, 0].tolist() == [0, 1, 0, 1, 0, 1]
    assert mixed[:, 1].tolist() == [0, 0, 1, 1, 2, 2]


def test_small_permutations_are_uniform() -> None:
    """Each of the 120 orders of 5 rows is as frequent as the others, over 24,000 epochs (chi-square, p > 0.001)."""
    order = GlobalOrder([5], [1], seed=123, shuffle=True)
    rows = order.locate(np.arange(5 * 24_000))[1].reshape(-1, 5)
    codes = rows @ 5 ** np.arange(5)
    counts = [int((codes == np.array(p) @ 5 ** np.arange(5)).sum()) for p in permutations(range(5))]
    assert sum(counts) == 24_000
    chi_square = sum((count - 200) ** 2 / 200 for count in counts)
    # 119 degrees of freedom; Wilson and Hilferty's approximation of the 0.999 quantile (z = 3.09)
    assert chi_square < 119 * (1 - 2 / (9 * 119) + 3.09 * math.sqrt(2 / (9 * 119))) ** 3


def test_rows_are_spread_over_positions_and_neighbours_are_independent() -> None:
    """For 1,000 rows: where a row lands, and the distance between neighbours, look uniform (chi-square, p > 0.001)."""
    order = GlobalOrder([1000], [1], seed=5, shuffle=True)
    rows = order.locate(np.arange(1000 * 400))[1].reshape(400, 1000)
    where = np.argsort(rows, axis=1)
    gaps = (rows[:, 1:] - rows[:, :-1]) % 1000  # never 0; each of 1..999 equally likely
    quantile_19, quantile_9 = 43.82, 27.88
    landed = np.bincount(where[:, 7] // 50, minlength=20)
    assert ((landed - 20) ** 2 / 20).sum() < quantile_19
    bins = np.bincount((gaps.ravel() - 1) * 9 // 999, minlength=9)
    expected = gaps.size / 9
    assert ((bins - expected) ** 2 / expected).sum() < quantile_9


def test_mixture_blocks_differ_from_one_another() -> None:
    order = GlobalOrder([10**6, 10**6], [1, 1], 9, shuffle=True)
    first, second = everything(order, 2 * MIXTURE_BLOCK).reshape(2, MIXTURE_BLOCK, 3)
    same = (first[:, 0] == second[:, 0]).mean()
    assert 0.45 < same < 0.55


def test_seeking_far_costs_no_more_than_seeking_near() -> None:
    order = GlobalOrder([10**12, 10**9], [0.5, 0.5], 0, shuffle=True)
    sources, rows, epochs = order.locate(np.array([2**61]))
    assert sources[0] in (0, 1)
    assert 0 <= rows[0] < 10**12
    assert epochs[0] > 10**5


@pytest.mark.parametrize("weights", [[1, 1e-9], [1e6, 1, 1e6]])
def test_a_source_that_would_never_come_is_refused(weights: list[float]) -> None:
    with pytest.raises(DataError, match=r"less than 1/4096 of the mixture.*raise its weight"):
        mixture_shares(weights)


def test_an_empty_source_is_refused() -> None:
    with pytest.raises(DataError, match="every source needs samples; the sources have 5, 0"):
        GlobalOrder([5, 0], [1, 1], 0, shuffle=True)


@given(st.lists(st.integers(0, 50), max_size=5), st.none() | st.integers(1, 300))
def test_evaluation_takes_each_row_at_most_once_in_stored_order(lengths: list[int], limit: int | None) -> None:
    sources, rows = evaluation_rows(lengths, limit)
    chosen = list(zip(sources.tolist(), rows.tolist(), strict=True))
    all_rows = [(source, row) for source, length in enumerate(lengths) for row in range(length)]
    if limit is None or limit >= len(all_rows):
        assert chosen == all_rows
    else:
        assert len(chosen) == limit
        assert chosen == sorted(set(chosen))
        assert set(chosen) <= set(all_rows)


def test_a_limited_evaluation_sees_every_source_in_proportion() -> None:
    sources, rows = evaluation_rows([1000, 3000], 40)
    assert np.bincount(sources).tolist() == [10, 30]
    assert rows[:3].tolist() == [0, 100, 200]
