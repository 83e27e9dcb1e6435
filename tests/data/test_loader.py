import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.data.loader import BatchLoader, StepBatch, evaluation_batches
from launcher.data.sampler import GlobalOrder
from launcher.planning.layout import BatchPlan

Rows = list[dict[str, Any]]


def rows(source: int, count: int) -> Rows:
    """Samples that name themselves: input id `1000 x source + row`."""
    return [{"input_ids": np.array([1000 * source + row, 0]), "labels": np.array([-100, row])} for row in range(count)]


def collate(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in ("input_ids", "labels")}


DATASETS = [rows(0, 30), rows(1, 11)]
ORDER = GlobalOrder([30, 11], [2, 1], seed=3, shuffle=True)


def loader(micro: int, accumulation: int, rank: int = 0, size: int = 1, **options: Any) -> BatchLoader:
    plan = BatchPlan(
        micro_batch_size=micro, gradient_accumulation_steps=accumulation, global_batch_size=micro * accumulation * size
    )
    return BatchLoader(DATASETS, ORDER, plan, rank, size, options.pop("collate", collate), **options)


def take(source: BatchLoader, count: int) -> list[StepBatch]:
    with source:
        return [next(source) for _ in range(count)]


def test_micro_batches_hold_the_samples_that_are_named() -> None:
    first, second = take(loader(micro=3, accumulation=2), 2)
    assert (first.consumed_samples, second.consumed_samples) == (6, 12)
    assert [batch["input_ids"].shape for batch in first.micro_batches] == [(3, 2), (3, 2)]
    inside = torch.cat([batch["input_ids"][:, 0] for batch in second.micro_batches]).tolist()
    assert inside == [1000 * source + row for source, row, _ in second.sample_ids.tolist()]
    assert second.sample_ids.tolist() == np.stack(ORDER.locate(np.arange(6, 12)), axis=1).tolist()


@pytest.mark.parametrize(("micro", "accumulation", "size"), [(12, 1, 1), (4, 1, 3), (1, 6, 2), (1, 1, 12), (2, 3, 2)])
def test_global_batches_do_not_depend_on_the_number_of_ranks(micro: int, accumulation: int, size: int) -> None:
    per_rank = [take(loader(micro, accumulation, rank, size), 5) for rank in range(size)]
    for step in range(5):
        together = np.empty((12, 3), np.int64)
        for rank in range(size):
            together[rank::size] = per_rank[rank][step].sample_ids
            assert per_rank[rank][step].consumed_samples == 12 * (step + 1)
        assert together.tolist() == np.stack(ORDER.locate(np.arange(12 * step, 12 * step + 12)), axis=1).tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 4), st.integers(0, 3))
def test_resuming_is_beginning_at_consumed_samples(consumed: int, size: int, steps: int) -> None:
    whole = take(loader(2, 2, size - 1, size, consumed_samples=consumed), steps + 1)
    resumed = take(loader(2, 2, size - 1, size, consumed_samples=consumed + 4 * size * steps), 1)
    assert resumed[0].sample_ids.tolist() == whole[steps].sample_ids.tolist()
    assert resumed[0].consumed_samples == whole[steps].consumed_samples


def test_steps_far_apart_are_looked_up_in_several_goes() -> None:
    plan = BatchPlan(micro_batch_size=5000, gradient_accumulation_steps=1, global_batch_size=5000)
    order = GlobalOrder([30], [1], seed=0, shuffle=True)
    steps = take(BatchLoader(DATASETS[:1], order, plan, 0, 1, lambda samples: {}), 3)
    ids = np.concatenate([step.sample_ids for step in steps])
    assert ids.tolist() == np.stack(order.locate(np.arange(15_000)), axis=1).tolist()


def test_an_error_in_the_background_is_raised_to_the_consumer_every_time() -> None:
    calls = []

    def fails_at_third(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
        calls.append(len(samples))
        if len(calls) == 3:
            raise OSError("the disk is gone")
        return collate(samples)

    with loader(1, 1, collate=fails_at_third) as steps:
        next(steps)
        next(steps)
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(steps)


def test_prefetching_is_bounded_and_close_ends_the_thread() -> None:
    calls = []
    enough = threading.Event()

    def counting(samples: Sequence[Any]) -> dict[str, torch.Tensor]:
        calls.append(len(samples))
        if len(calls) == 4:
            enough.set()
        return collate(samples)

    steps = loader(1, 1, collate=counting, prefetch=3)
    assert enough.wait(10)  # three wait in the queue, the fourth is in the thread's hand
    assert not threading.Event().wait(0.3)
    assert len(calls) == 4
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batch-loader"]
    with pytest.raises(StopIteration):
        next(steps)


def test_sizes_that_do_not_fit_are_refused() -> None:
    plan = BatchPlan(micro_batch_size=2, gradient_accumulation_steps=2, global_batch_size=8)
    with pytest.raises(ValueError, match="does not fit 3 data-parallel ranks"):
        BatchLoader(DATASETS, ORDER, plan, 0, 3, collate)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.none() | st.integers(1, 40),
)
def test_evaluation_sees_every_sample_once_in_equal_passes(
    lengths: list[int], micro: int, size: int, limit: int | None
) -> None:
    datasets = [rows(source, length) for source, length in enumerate(lengths)]
    per_rank = [list(evaluation_batches(datasets, micro, rank, size, limit, collate)) for rank in range(size)]
    assert len({len(batches) for batches in per_rank}) == 1
    seen: list[int] = []
    for batch in (batch for batches in per_rank for batch in batches):
        assert batch["labels"].shape == (micro, 2)
        real = (batch["labels"] != -100).any(dim=1)
        seen += batch["input_ids"][real, 0].tolist()
    everything = [row["input_ids"][0] for dataset in datasets for row in dataset]
    assert len(seen) == len(set(seen)) == min(len(everything), limit or len(everything))
    assert set(seen) <= set(everything)


def test_what_workers_need_of_the_data_imports_quickly() -> None:
    """Neither `datasets` nor `transformers`, nor torch: the loader stacks nothing itself."""
    script = (
        "import sys, launcher.data.store, launcher.data.sampler, launcher.data.loader; "
        "print(*sorted({'torch', 'datasets', 'transformers', 'tokenizers', 'pyarrow', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []
