"""From the global order to one rank's batches. Knows no task: the task stacks samples itself (`collate`)."""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from launcher.data.sampler import GlobalOrder, evaluation_rows
from launcher.data.store import IGNORED
from launcher.planning.layout import BatchPlan

if TYPE_CHECKING:
    from torch import Tensor

    Batch = dict[str, Tensor]

LOCATE_AT_ONCE = 4096
"""Samples that are looked up in the order together: 1 to 3 microseconds each then, some 100 for one alone."""

EPOCH = "epoch"
"""Name under which a training sample tells its epoch, so that a task can vary it from one epoch to the next."""

Sample = Mapping[str, Any]
Collate = Callable[[Sequence[Sample]], "Batch"]


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of a global batch.

    Attributes:
        micro_batches: one a forward and backward pass, as the task collates them.
        sample_ids: int64 [samples of this rank, 3]: source, row and epoch of each.
        consumed_samples: position in the global order after this batch: what a checkpoint must remember of the data.
    """

    micro_batches: "list[Batch]"
    sample_ids: NDArray[np.int64]
    consumed_samples: int


class BatchLoader(Iterator[StepBatch]):
    """An endless iterator of optimizer steps.

    Of the global batch at positions c, c + 1, ... rank r of n takes c + r, c + r + n, ...; so any number of ranks sees
    the same global batches. A background thread prepares steps ahead. Close it, or use it in a `with`.

    Args:
        datasets: one a source.
        order: over those sources.
        batch: sizes; `global_batch_size` must be the product of the others and `data_parallel_size`.
        data_parallel_rank: this rank.
        data_parallel_size: number of ranks.
        collate: stacks samples to a micro batch.
        consumed_samples: position to begin at.
        prefetch: steps to have ready.
    """

    def __init__(
        self,
        datasets: Sequence[Sequence[Sample]],
        order: GlobalOrder,
        batch: BatchPlan,
        data_parallel_rank: int,
        data_parallel_size: int,
        collate: Collate,
        consumed_samples: int = 0,
        prefetch: int = 2,
    ) -> None:
        if batch.micro_batch_size * batch.gradient_accumulation_steps * data_parallel_size != batch.global_batch_size:
            raise ValueError(f"{batch} does not fit {data_parallel_size} data-parallel ranks")
        self.datasets = datasets
        self.order = order
        self.batch = batch
        self.rank = data_parallel_rank
        self.size = data_parallel_size
        self.collate = collate
        self._steps = self._locate_ahead(consumed_samples)
        self._ready: queue.Queue[StepBatch | BaseException] = queue.Queue(prefetch)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, name="batch-loader", daemon=True)
        self._thread.start()

    def __next__(self) -> StepBatch:
        if self._error is None:
            if self._closed.is_set():
                raise StopIteration
            item = self._ready.get()
            if isinstance(item, StepBatch):
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        """Stop the thread and wait for it; further steps raise StopIteration."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> "BatchLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> None:
        item: StepBatch | BaseException
        while not self._closed.is_set():
            try:
                item = self._read_step()
            except BaseException as error:  # whatever it is, the consumer must hear of it
                item = error
            self._put(item)
            if isinstance(item, BaseException):
                return

    def _put(self, item: StepBatch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def _read_step(self) -> StepBatch:
        sample_ids, consumed_samples = next(self._steps)
        samples = [{**self.datasets[source][row], EPOCH: epoch} for source, row, epoch in sample_ids.tolist()]
        size = self.batch.micro_batch_size
        micro_batches = [self.collate(samples[start : start + size]) for start in range(0, len(samples), size)]
        return StepBatch(micro_batches, sample_ids, consumed_samples)

    def _locate_ahead(self, consumed: int) -> Iterator[tuple[NDArray[np.int64], int]]:
        """Yield each step's samples and the position after it, asking the order for many steps at a time."""
        per_step = self.batch.global_batch_size
        steps = max(1, LOCATE_AT_ONCE * self.size // per_step)
        while True:
            positions = np.arange(consumed + self.rank, consumed + steps * per_step, self.size)
            sample_ids = np.stack(self.order.locate(positions), axis=1)
            for of_step in sample_ids.reshape(steps, -1, 3):
                consumed += per_step
                yield of_step, consumed


def evaluation_batches(
    datasets: Sequence[Sequence[Sample]],
    micro_batch_size: int,
    rank: int,
    size: int,
    max_samples: int | None,
    collate: Collate,
) -> "Iterator[Batch]":
    """Yield one rank's validation batches: over all ranks, every chosen sample is seen exactly once.

    Every rank gets the same number of batches of the same size, because the forward passes of sharded models wait for
    one another: what is missing is filled up with samples without targets (all labels ignored).

    Args:
        datasets: one a validation source.
        micro_batch_size: samples in each batch.
        rank: this data-parallel rank.
        size: number of data-parallel ranks.
        max_samples: at most so many samples, over all ranks; see `evaluation_rows`.
        collate: stacks samples to a batch.
    """
    sources, rows = (chosen.tolist() for chosen in evaluation_rows([len(dataset) for dataset in datasets], max_samples))
    per_pass = micro_batch_size * size
    for start in range(0, len(rows), per_pass):
        mine = range(start + rank, min(start + per_pass, len(rows)), size)
        samples = [datasets[sources[index]][rows[index]] for index in mine]
        if len(samples) < micro_batch_size:
            filler = without_targets(datasets[sources[0]][rows[0]])
            samples += [filler] * (micro_batch_size - len(samples))
        yield collate(samples)


def without_targets(sample: Sample) -> Sample:
    """Return the sample with every label (fields whose name ends with `labels`) ignored: -100, or NaN for numbers."""
    ignored = {
        name: np.full_like(values, np.nan if np.issubdtype(values.dtype, np.floating) else IGNORED)
        for name, values in sample.items()
        if name.endswith("labels")
    }
    return {**sample, **ignored}
