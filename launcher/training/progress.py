"""How far a run is, as its loop counts and its checkpoints say. No torch here."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class Progress:
    """Where a run is; all that a checkpoint holds besides DeepSpeed's state.

    Attributes:
        step: optimizer steps completed.
        consumed_samples: samples of the global order already trained on.
        best_eval_loss: lowest validation loss (or watched metric, smaller is better) so far.
        evaluations_without_improvement: for early stopping.
        eval_loss: validation loss measured at step `eval_step`.
        eval_score: the watched metric of that step, smaller is better.
        eval_step: step of the last evaluation.
    """

    step: int = 0
    consumed_samples: int = 0
    best_eval_loss: float | None = None
    evaluations_without_improvement: int = 0
    eval_loss: float | None = None
    eval_score: float | None = None
    eval_step: int = -1


@dataclass(frozen=True)
class TrainResult:
    """How a rank's training ended.

    Attributes:
        status: `complete` (all steps made, or stopped early by the validation loss) or `stopped` (asked to, and saved).
        step: optimizer steps completed.
        consumed_samples: samples trained on.
        early_stopped: the validation loss ended it.
        metrics: the last logged metrics, and the last evaluation's.
    """

    status: Literal["complete", "stopped"]
    step: int
    consumed_samples: int
    early_stopped: bool
    metrics: dict[str, Any]
