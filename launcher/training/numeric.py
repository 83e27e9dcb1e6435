"""Watching the loss: NaN, infinity and spikes, the same verdict on every rank, without waiting for the device."""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from launcher.checkpoints.fault_plan import spoiled
from launcher.errors import BadLossesError, NumericError
from launcher.recipe.run_sections import FaultToleranceSection
from launcher.run_directory import RunDirectory, append_json_line, read_json_lines

HISTORY = 50
"""Steps whose median loss a spike is measured against."""
MIN_HISTORY = 10


@dataclass(frozen=True)
class Observed:
    """A step whose loss is being summed over ranks.

    Attributes:
        step: of the optimizer, counted from 1.
        begin: number of the first sample of its global batch, in the global order.
        end: the number after the last one.
        num_targets: of the global batch.
    """

    step: int
    begin: int
    end: int
    num_targets: int


class LossWatch:
    """Looks at each step's loss one step later, when it costs no waiting any more, and before anything is saved.

    Where a bad batch is left out in place, it looks before the step is made, and the device is waited for.

    Args:
        settings: of the recipe.
        run_directory: where skipped samples are recorded.
        rank: of this process; rank 0 records.
    """

    def __init__(self, settings: FaultToleranceSection, run_directory: RunDirectory, rank: int) -> None:
        self.settings = settings
        self.path = run_directory.skipped
        self.rank = rank
        self._ranges = [(record["begin"], record["end"]) for record in read_json_lines(self.path)]
        self._losses: deque[float] = deque(maxlen=HISTORY)
        self._sum: torch.Tensor | None = None
        self._work: Any = None
        self._observed: Observed | None = None
        self._left_out = 0

    def is_skipped(self, begin: int, end: int) -> bool:
        """Whether an earlier attempt found a bad loss in these samples."""
        return any(begin < known_end and known_begin < end for known_begin, known_end in self._ranges)

    def note(self, loss_sum: torch.Tensor, observed: Observed) -> None:
        """Begin to sum a step's loss over ranks; collective."""
        self._sum = loss_sum.detach().clone().reshape(1).double()
        if spoiled(self.rank, observed.step):
            self._sum *= math.nan
        self._work, self._observed = dist.all_reduce(self._sum, async_op=True), observed

    def check(self) -> None:
        """Judge the step that was noted last; collective, and the same on every rank.

        Raises:
            NumericError: its loss is not finite, or a spike.
        """
        found = self._judged()
        if found is None:
            return
        observed, wrong = found
        text = _told(observed, wrong)
        if self.settings.on_bad_loss == "stop":
            raise NumericError(
                f"{text}. Set fault_tolerance.on_bad_loss: rollback to go back to the last checkpoint and leave these "
                "samples out, or lower training.learning_rate"
            )
        self._leave_out(observed, wrong)
        raise NumericError(f"{text}; these samples are left out from now on")

    def left_out(self) -> str | None:
        """Judge the step that was noted last, which is not made yet; collective, and the same on every rank.

        Returns:
            None for a step to be made; otherwise what is wrong with it: its samples are left out.

        Raises:
            BadLossesError: so many were left out that it is not the samples.
        """
        found = self._judged()
        if found is None:
            return None
        observed, wrong = found
        text, limit = _told(observed, wrong), self.settings.max_bad_losses
        if self._left_out >= limit:
            raise BadLossesError(
                f"{text}, and {self._left_out} batches are left out already (fault_tolerance.max_bad_losses {limit}); "
                "lower training.learning_rate, or look at the samples in skipped.jsonl"
            )
        self._left_out += 1
        self._leave_out(observed, wrong)
        return f"{text}; the step is not made, and these samples are left out"

    def _judged(self) -> tuple[Observed, str] | None:
        """The step that was noted last and what is wrong with it; None when nothing is."""
        if self._observed is None or self._sum is None:
            return None
        self._work.wait()
        observed, loss = self._observed, float(self._sum) / max(self._observed.num_targets, 1)
        self._observed = None
        wrong = self._wrong(loss)
        if wrong is None:
            self._losses.append(loss)
            return None
        return observed, wrong

    def _leave_out(self, observed: Observed, wrong: str) -> None:
        self._ranges.append((observed.begin, observed.end))
        if self.rank == 0:
            record = {"step": observed.step, "begin": observed.begin, "end": observed.end, "loss": wrong}
            append_json_line(self.path, record)

    def _wrong(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return str(loss)
        factor = self.settings.loss_spike_factor
        if factor is None or len(self._losses) < MIN_HISTORY:
            return None
        usual = statistics.median(self._losses)
        if loss <= factor * usual:
            return None
        return f"{loss:.4f}, more than {factor:g} times the median {usual:.4f} of the {len(self._losses)} steps before"


def _told(observed: Observed, wrong: str) -> str:
    return f"the loss of step {observed.step} is {wrong} (samples {observed.begin} to {observed.end - 1})"


class StepJudge:
    """Judges one step's loss when the forward passes are made, and before the optimizer's step is.

    Args:
        watch: of this rank.
        step: that is being made, counted from 1.
        end: the number after its last sample, in the global order.
        size: of the global batch.
        counts: whether this rank's losses count.
    """

    def __init__(self, watch: LossWatch, step: int, end: int, size: int, *, counts: bool) -> None:
        self._watch, self._step, self._end, self._size, self._counts = watch, step, end, size, counts

    def begin(self, loss_sum: torch.Tensor, num_targets: int) -> None:
        """All forward passes are made; collective, returns at once."""
        own = loss_sum if self._counts else loss_sum * 0  # which is not 0 where the loss is no number
        self._watch.note(own, Observed(self._step, self._end - self._size, self._end, num_targets))

    def refuses(self) -> str | None:
        """Why the step is not to be made; collective, and waits for the device. See `LossWatch.left_out`."""
        return self._watch.left_out()
