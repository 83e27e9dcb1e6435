"""What changes rates and weights just before each optimizer step: gradual unfreezing, and the pull to the start."""

from collections.abc import Callable
from typing import Any

import torch

from launcher.recipe.training_sections import OptimizerSection
from launcher.training.engine import DEPTH
from launcher.training.fp32_weights import Fp32Weights


class BeforeStep:
    """Called when the gradients of a step are there, on every rank.

    Make it before a checkpoint is loaded: a run that goes on is pulled to where it began as well.

    Args:
        engine: of the run.
        zero_stage: of it.
        section: `optimizer` of the recipe.
        step: tells how many steps have been made.
    """

    def __init__(self, engine: Any, zero_stage: int, section: OptimizerSection, step: Callable[[], int]) -> None:
        self._engine, self._section, self._step = engine, section, step
        self._weights = Fp32Weights(engine, zero_stage) if section.decay_to_start else None
        self._start = [] if self._weights is None else [flat.detach().clone() for flat in self._weights.flats]

    def __call__(self) -> None:
        """Hold still what is frozen yet, then pull what moves."""
        every = self._section.unfreeze_every_steps
        if every is not None:
            open_layers = self._step() // every
            for group in self._engine.optimizer.param_groups:
                if group[DEPTH] > open_layers:
                    group["lr"] = 0.0  # the schedule sets it anew after each step
        if self._weights is not None:
            self._pull(self._weights)

    @torch.no_grad()
    def _pull(self, weights: Fp32Weights) -> None:
        """`weights -= learning rate x strength x (weights - start)`; the step that follows puts them to use."""
        for flat, start, rate in zip(weights.flats, self._start, weights.learning_rates(), strict=True):
            if rate:
                flat.lerp_(start, rate * self._section.decay_to_start)


def make_before_step(
    engine: Any, zero_stage: int, section: OptimizerSection, step: Callable[[], int]
) -> Callable[[], None]:
    """What a recipe's section asks for; nothing, mostly."""
    if section.unfreeze_every_steps is None and not section.decay_to_start:
        return lambda: None
    return BeforeStep(engine, zero_stage, section, step)
