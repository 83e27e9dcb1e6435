"""What changes rates and weights just before each optimizer step: gradual unfreezing, and pulls to the start."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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
        importance: file of the weights' importance to an earlier task, a tensor a parameter; for `section.ewc`.
    """

    def __init__(
        self,
        engine: Any,
        zero_stage: int,
        section: OptimizerSection,
        step: Callable[[], int],
        importance: Path | None = None,
    ) -> None:
        self._engine, self._section, self._step = engine, section, step
        pulls = section.decay_to_start or section.ewc is not None
        self._weights = Fp32Weights(engine, zero_stage) if pulls else None
        self._start = [] if self._weights is None else [flat.detach().clone() for flat in self._weights.flats]
        self._importance: list[Tensor] = []
        if self._weights is not None and section.ewc is not None and importance is not None:
            self._importance = own_parts(self._weights, importance)

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
        ewc = self._section.ewc
        for index, rate in enumerate(weights.learning_rates()):
            flat, start = weights.flats[index], self._start[index]
            if rate and self._section.decay_to_start:
                flat.lerp_(start, rate * self._section.decay_to_start)
            if rate and ewc is not None:
                flat.lerp_(start, (rate * ewc.strength * self._importance[index]).clamp(max=1))


def own_parts(weights: Fp32Weights, file: Path) -> list[Tensor]:
    """Read this rank's part of a file that holds a tensor a parameter; 0 where it holds none.

    Returns:
        A tensor for each of the rank's flat ones, of the same shape and on the same device.
    """
    from safetensors import safe_open

    parts = [torch.zeros_like(flat, dtype=torch.float32) for flat in weights.flats]
    with safe_open(file, framework="pt") as stored:
        known = set(stored.keys())
        for piece in weights.pieces():
            if piece.name in known:
                whole = stored.get_tensor(piece.name).flatten()
                place = parts[piece.flat].view(-1).narrow(0, piece.start, piece.numel)
                place.copy_(whole.narrow(0, piece.offset, piece.numel))
    return parts
