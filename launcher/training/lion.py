"""Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), which torch does not have and DeepSpeed compiles."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Steps by the sign of a momentum, with decoupled weight decay; one state a weight, where Adam has two.

    Every element is moved by itself, so it is the same whatever part of the weights a rank holds.

    Args:
        params: parameters, or groups of them.
        lr: every element moves by this much; a third to a tenth of AdamW's is usual.
        betas: of the mixture whose sign is taken, and of the momentum that is kept.
        weight_decay: multiplied by the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch has overloads
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            now, kept = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                momentum = state["exp_avg"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                direction = momentum.lerp(parameter.grad, 1 - now).sign_()
                parameter.sub_(direction, alpha=group["lr"])
                momentum.lerp_(parameter.grad, 1 - kept)
        return loss
