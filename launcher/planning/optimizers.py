"""The optimizers that a recipe can name, as the pinned DeepSpeed 0.19.8 takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.errors import Problem
from launcher.recipe.schema import OptimizerSection


@dataclass(frozen=True)
class Optimizer:
    """One kind.

    Attributes:
        deepspeed_type: its name in DeepSpeed's config; a name that DeepSpeed does not know is one of `torch.optim`.
        params: its constants besides the learning rate and weight decay, and the recipe's fields that they come from.
        zero_stages: under which a test of ours has trained with it.
        reason: what keeps the other stages out.
    """

    deepspeed_type: str
    params: Callable[[OptimizerSection], dict[str, tuple[Any, str]]]
    zero_stages: frozenset[int]
    reason: str = ""


_ALL_STAGES = frozenset({0, 1, 2, 3})

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        "AdamW",
        lambda o: {
            "betas": ([o.adam_beta1, o.adam_beta2], "optimizer.adam_beta1"),
            "eps": (o.adam_epsilon, "optimizer.adam_epsilon"),
        },
        _ALL_STAGES,
    ),
    "sgd": Optimizer("SGD", lambda o: {"momentum": (o.momentum, "optimizer.momentum")}, _ALL_STAGES),
}
"""By `optimizer.type`."""


def optimizer_problems(section: OptimizerSection, zero_stage: int) -> list[Problem]:
    """Say why an optimizer does not run under a ZeRO stage; empty when it does."""
    kind = OPTIMIZERS[section.type]
    if zero_stage in kind.zero_stages:
        return []
    fits = " or ".join(str(stage) for stage in sorted(kind.zero_stages))
    message = f"{section.type} does not train under ZeRO stage {zero_stage}: {kind.reason}; set zero.stage to {fits}"
    return [Problem(message, "optimizer.type")]
