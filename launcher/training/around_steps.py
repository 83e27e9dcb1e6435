"""What happens around each optimizer step besides it: rates, pulls, averages and ranks, as a recipe asks."""

from collections.abc import Callable
from typing import Any

from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.training.adalora import RankSchedule
from launcher.training.averaging import WeightAverage
from launcher.training.before_step import BeforeStep
from launcher.training.fp32_weights import Fp32Weights


class AroundSteps:
    """Made before a checkpoint is loaded: a run that goes on is pulled to where it began as well.

    Args:
        plan: of the run.
        engine: of the run.
        prepared: the data.
        max_steps: of the run.
        rank: of this process.
        step: tells how many steps have been made.

    Attributes:
        average: of the weights, if the recipe keeps one.
        ranks: of AdaLoRA, if that is trained.
    """

    def __init__(
        self, plan: Plan, engine: Any, prepared: PreparedData, max_steps: int, rank: int, step: Callable[[], int]
    ) -> None:
        recipe, stage = plan.recipe, plan.zero_stage
        optimizer, ema, adapter = recipe.optimizer, recipe.training.ema, recipe.adapter
        self.average: WeightAverage | None = None
        if ema is not None:
            self.average = WeightAverage(Fp32Weights(engine, stage), ema, rank if stage else 0)
        self.ranks: RankSchedule | None = None
        if adapter is not None and adapter.method == "adalora":
            clip = recipe.training.max_grad_norm
            self.ranks = RankSchedule(engine, stage, adapter.adalora, max_steps, clip, step)
        self._before: BeforeStep | None = None
        if optimizer.unfreeze_every_steps is not None or optimizer.decay_to_start or optimizer.ewc is not None:
            self._before = BeforeStep(engine, stage, optimizer, step, prepared.importance)

    def before_step(self) -> None:
        """The gradients of a step are there, on every rank; not called in a pipeline, where nothing needs it."""
        if self._before is not None:
            self._before()
        if self.ranks is not None:
            self.ranks.before_step()

    def after_step(self, step: int, grad_norm: float | None) -> None:
        """So many optimizer steps are made, the last one with gradients of this norm."""
        if self.ranks is not None:
            self.ranks.after_step(step, grad_norm)
        if self.average is not None:
            self.average.update(step)
