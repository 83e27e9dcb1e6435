"""The optimizers that a recipe can name, as the pinned DeepSpeed 0.19.8 takes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from launcher.errors import Problem
from launcher.planning.layout import Layout
from launcher.recipe.schema import Recipe
from launcher.recipe.training_sections import OptimizerSection


@dataclass(frozen=True)
class Optimizer:
    """One kind.

    Attributes:
        deepspeed_type: its name in DeepSpeed's config; a name that DeepSpeed does not know is one of `torch.optim`.
        params: its constants besides the learning rate and weight decay, and the recipe's fields that they come from.
        zero_stages: under which a test of ours has trained with it; none of them: it is refused.
        reason: what keeps the other stages out.
        precisions: in which a test of ours has trained with it.
        clips: whether DeepSpeed clips its gradients under the stages above 0.
    """

    deepspeed_type: str
    params: Callable[[OptimizerSection], dict[str, tuple[Any, str]]]
    zero_stages: frozenset[int]
    reason: str = ""
    precisions: frozenset[str] = frozenset({"fp32", "bf16", "fp16"})
    clips: bool = True


_ALL_STAGES = frozenset({0, 1, 2, 3})


def _muon(section: OptimizerSection) -> dict[str, tuple[Any, str]]:
    """Both halves: Muon's own constants, and those of the AdamW beside it (`runtime/engine.py: _muon_param_groups`)."""
    params: dict[str, tuple[Any, str]] = {
        "momentum": (0.95 if section.momentum is None else section.momentum, "optimizer.momentum"),
        "betas": ([section.adam_beta1, section.adam_beta2], "optimizer.adam_beta1"),
        "eps": (section.adam_epsilon, "optimizer.adam_epsilon"),
        "torch_adam": (True, "optimizer.type"),
    }
    if section.adam_learning_rate is not None:
        params["adam_lr"] = (section.adam_learning_rate, "optimizer.adam_learning_rate")
    return params


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(
        "AdamW",
        lambda o: {
            "betas": ([o.adam_beta1, o.adam_beta2], "optimizer.adam_beta1"),
            "eps": (o.adam_epsilon, "optimizer.adam_epsilon"),
        },
        _ALL_STAGES,
    ),
    "sgd": Optimizer("SGD", lambda o: {"momentum": (o.momentum or 0.0, "optimizer.momentum")}, _ALL_STAGES),
    "adafactor": Optimizer(
        "Adafactor",
        lambda o: {},
        frozenset({0}),
        "the stages above it flatten the weights, and Adafactor's second moments are those of rows and columns",
        precisions=frozenset({"fp32"}),
    ),
    "muon": Optimizer(
        "Muon",
        _muon,
        frozenset({0, 1, 2}),
        "stage 3 refuses it together with reduce_scatter (runtime/zero/stage3.py)",
        precisions=frozenset({"fp32"}),
        clips=False,
    ),
    "lion": Optimizer(
        "Lion",
        lambda o: {"betas": ([o.adam_beta1, o.adam_beta2], "optimizer.adam_beta1")},
        _ALL_STAGES,
        precisions=frozenset({"fp32", "bf16"}),
    ),
    "adamw_8bit": Optimizer(
        "AdamW8bit",
        lambda o: {},
        frozenset(),
        "its states are bitsandbytes', whose blocks of 2048 elements ZeRO would cut, and which computes on GPUs",
    ),
}
"""By `optimizer.type`."""

_EVERYWHERE = ("adamw", "sgd", "lion")
"""Those that work on every element by itself, whatever part of the weights a rank holds, and wherever."""


def optimizer_problems(recipe: Recipe, layout: Layout, zero_stage: int, offloads: bool) -> list[Problem]:
    """Say why an optimizer does not train what a recipe asks for; empty when it does."""
    name = recipe.optimizer.type
    kind = OPTIMIZERS[name]
    if not kind.zero_stages:
        fits = ", ".join(other for other, known in OPTIMIZERS.items() if known.zero_stages)
        message = f"{name} is not trained by a test of ours: {kind.reason}; set it to one of {fits}"
        return [Problem(message, "optimizer.type")]
    problems = []
    if zero_stage not in kind.zero_stages:
        fits = " or ".join(str(stage) for stage in sorted(kind.zero_stages))
        message = f"{name} does not train under ZeRO stage {zero_stage}: {kind.reason}; set zero.stage to {fits}"
        problems.append(message)
    if recipe.training.precision not in kind.precisions:
        problems.append(f"{name} is trained by our tests in {' or '.join(sorted(kind.precisions))} only")
    if name not in _EVERYWHERE and (layout.data_parallel_size < layout.world_size or layout.expert_parallel_size > 1):
        problems.append(f"{name} is trained by our tests in data parallel runs only; leave parallel out")
    if name not in _EVERYWHERE and offloads:
        problems.append(f"{name} is not offloaded by a test of ours; leave zero.offload_optimizer out")
    if not kind.clips and zero_stage > 0 and recipe.training.max_grad_norm > 0:
        problems.append(
            f"under ZeRO stage {zero_stage} DeepSpeed clips what {name} makes of the gradients, not the gradients; set "
            "training.max_grad_norm to 0, or zero.stage to 0"
        )
    return [Problem(message, "optimizer.type") for message in problems]
