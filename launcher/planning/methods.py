"""Where ways to train that use the fp32 weights themselves have been proved: an average of them, a pull on them."""

from collections.abc import Mapping
from typing import Any

from launcher.errors import ExpectedError, Problem
from launcher.planning.layout import Layout
from launcher.recipe.schema import Recipe

_KEPT_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "bf16.bf16_master_weights_and_grads": (False,),
    "data_types.grad_accum_dtype": (None,),
    "fp16.fp16_master_weights_and_grads": (False,),
    "zero_optimization.offload_optimizer.device": ("none", "cpu"),
    "zero_optimization.offload_param.device": ("none", "cpu"),
    "zero_optimization.zenflow": (None,),
    "zero_optimization.zero_hpz_partition_size": (1,),
}
"""DeepSpeed's keys with which there is no fp32 copy in its usual place -> the values with which there is."""


def method_problems(
    recipe: Recipe, layout: Layout, zero_stage: int, deepspeed_config: Mapping[str, Any]
) -> list[Problem]:
    """Refuse what no test of ours has trained.

    Args:
        recipe: to train.
        layout: of the run.
        zero_stage: of the run.
        deepspeed_config: resolved.
    """
    chosen = ["training.ema"] if recipe.training.ema is not None else []
    chosen += ["optimizer.decay_to_start"] if recipe.optimizer.decay_to_start else []
    chosen += ["optimizer.ewc"] if recipe.optimizer.ewc is not None else []
    problems = []
    if recipe.adapter is not None and recipe.adapter.method == "adalora":
        chosen.append("adapter.method")
        problems += _adalora_problems(recipe, zero_stage, deepspeed_config)
    for where in chosen:
        if layout.model_parallel_size > 1 or layout.expert_parallel_size > 1:
            problems.append(Problem("is for data parallel runs, with any ZeRO stage: leave parallel out", where))
        if zero_stage == 0 and recipe.training.precision != "fp32":
            problems.append(
                Problem(
                    f"needs fp32 weights, and ZeRO stage 0 in {recipe.training.precision} keeps them in a form of its "
                    "own; set zero.stage to 1, 2 or 3",
                    where,
                )
            )
        if recipe.training.precision == "fp16":
            problems.append(Problem("is proved in fp32 and bf16: set training.precision to one of them", where))
        for path, usual in _KEPT_ELSEWHERE.items():
            value: Any = deepspeed_config
            for key in path.split("."):
                value = value.get(key, usual[0]) if isinstance(value, Mapping) else usual[0]
            if value not in usual:
                problems.append(Problem(f"is not proved with DeepSpeed's {path} = {value!r}: leave that out", where))
    return problems


def _adalora_problems(recipe: Recipe, zero_stage: int, deepspeed_config: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if zero_stage == 3:
        message = (
            "adalora takes ranks away, which cannot be done to weights that ZeRO 3 has partitioned; set zero.stage "
        )
        problems.append(Problem(f"{message}to 2, or the method to lora", "adapter.method"))
    if "offload_optimizer" in deepspeed_config.get("zero_optimization", {}):
        message = "adalora is not proved with an optimizer on the host; leave zero.offload_optimizer out"
        problems.append(Problem(message, "adapter.method"))
    if recipe.training.max_steps is not None:
        section = recipe.adapter.adalora if recipe.adapter is not None else None
        first, last = (section.initial_steps or 0, section.final_steps or 0) if section is not None else (0, 0)
        if first + last >= recipe.training.max_steps:
            message = f"initial_steps {first} and final_steps {last} leave none of {recipe.training.max_steps} steps"
            problems.append(Problem(f"{message} between them in which ranks are taken away", "adapter.adalora"))
    return problems


def with_average(recipe: Recipe, use: bool | None) -> Recipe:
    """The recipe with another answer to whether averaged weights are evaluated and exported; `None`: its own.

    Raises:
        ExpectedError: it keeps no average.
    """
    training = recipe.training
    if use is None or (training.ema is None and not use):
        return recipe
    if training.ema is None:
        raise ExpectedError("the run keeps no averaged weights: its recipe has no training.ema")
    section = training.model_copy(update={"ema": training.ema.model_copy(update={"use": use})})
    return recipe.model_copy(update={"training": section})
