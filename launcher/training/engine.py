"""The DeepSpeed engine of a plan: parameter groups, schedule, `deepspeed.initialize`."""

import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from launcher.errors import RecipeError
from launcher.models.sequence import spread_sequences
from launcher.planning.plan import Plan
from launcher.recipe.training_sections import TrainingSection
from launcher.training import upstream
from launcher.training.lion import Lion
from launcher.training.swap_folder import SwapFolder
from launcher.training.swapped_states import build_async_io, keep_whole_states

DEPTH = "layers_above"
"""Key of a parameter group: so many layers lie above its parameters."""
_LAYER = re.compile(r"\.(\d+)\.")


def total_steps(training: TrainingSection, samples_per_epoch: int, global_batch_size: int) -> int:
    """Optimizer steps of the whole run.

    `num_train_epochs` counts samples, not whole batches: the last batch reaches into the next epoch's order.
    """
    if training.max_steps is not None:
        return training.max_steps
    epochs = training.num_train_epochs or 1.0
    return max(1, math.ceil(epochs * samples_per_epoch / global_batch_size))


def warmup_steps(training: TrainingSection, max_steps: int) -> int:
    """Steps of linear warm-up; a ratio is rounded up, as in the Hugging Face Trainer."""
    if training.warmup_steps is not None:
        return training.warmup_steps
    return math.ceil((training.warmup_ratio or 0.0) * max_steps)


def scheduler_factory(training: TrainingSection, max_steps: int) -> Callable[[Any], Any]:
    """Return what makes the learning-rate schedule once DeepSpeed has made the optimizer.

    The schedule is `transformers.get_scheduler`'s. (DeepSpeed's own warm-up gives two steps of learning rate 0.)

    Raises:
        RecipeError: the scheduler is unknown, or refuses its arguments.
    """
    from transformers import get_scheduler
    from transformers.trainer_utils import SchedulerType

    def make(optimizer: Any) -> Any:
        return get_scheduler(
            training.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=warmup_steps(training, max_steps),
            num_training_steps=max_steps,
            scheduler_specific_kwargs=dict(training.lr_scheduler_kwargs),
        )

    known = [kind.value for kind in SchedulerType]
    if training.lr_scheduler_type not in known:
        raise RecipeError.single(
            "training.lr_scheduler_type", f"{training.lr_scheduler_type!r} is none of {', '.join(known)}"
        )
    try:
        make(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=training.learning_rate))
    except (TypeError, ValueError) as error:
        raise RecipeError.single("training.lr_scheduler_kwargs", f"{training.lr_scheduler_type}: {error}") from error
    return make


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed ones and the others: biases and everything of one dimension (norms).

    Under ZeRO 3 a partitioned parameter's own shape is flat; DeepSpeed keeps the true one in `ds_shape`.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) > 1 else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def layered_groups(model: nn.Module, weight_decay: float, learning_rate: float, decay: float) -> list[dict[str, Any]]:
    """The same, further split by layer, each with a learning rate of its own: the head's first, at the full rate.

    A layer is told by the first number in its parameters' names; what comes before any layer (embeddings) is below the
    first one, everything else without a number (heads, last norms) above the last one.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    depths = {name: int(found.group(1)) + 1 for name in names.values() if (found := _LAYER.search(name))}
    top = max(depths.values(), default=0) + 1
    groups: dict[tuple[int, float], list[nn.Parameter]] = {}
    for group in parameter_groups(model, weight_decay):
        for parameter in group["params"]:
            name = names[id(parameter)]
            depth = depths.get(name, 0 if "embed" in name else top)
            groups.setdefault((-depth, group["weight_decay"]), []).append(parameter)
    return [
        {
            "params": groups[key],
            "weight_decay": key[1],
            "lr": learning_rate * decay ** (top + key[0]),
            DEPTH: top + key[0],
        }
        for key in sorted(groups)
    ]


def check_precision(precision: str) -> None:
    """Refuse a number format that this rank's device does not compute in.

    Raises:
        RecipeError: says which formats it does.
    """
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    known = {"fp32": True, "bf16": accelerator.is_bf16_supported(), "fp16": accelerator.is_fp16_supported()}
    if not known[precision]:
        fits = " or ".join(name for name, supported in known.items() if supported)
        where = "this processor" if accelerator.device_name() == "cpu" else accelerator.device_name()
        raise RecipeError.single("training.precision", f"{where} does not compute in {precision}; set it to {fits}")


def _own_optimizer(section: dict[str, Any]) -> Callable[[Any], torch.optim.Optimizer] | None:
    """What makes the optimizer, where DeepSpeed has none that runs on every device; `None`: DeepSpeed makes it."""
    if section["type"].lower() != "lion":
        return None
    return lambda groups: Lion(groups, **section["params"])


def build_engine(plan: Plan, model: nn.Module, max_steps: int, swap: SwapFolder | None = None) -> Any:
    """Initialise DeepSpeed on a model, on every rank.

    Args:
        plan: of the run.
        model: to train.
        max_steps: of the schedule.
        swap: where the optimizer's files are, if the plan has it on NVMe.

    Returns:
        The `DeepSpeedEngine`, with optimizer and schedule inside.

    Raises:
        RecipeError: the device does not compute in the plan's precision, the schedule is not known, or DeepSpeed cannot
            compile what NVMe needs.
    """
    import deepspeed

    precision = plan.recipe.training.precision
    check_precision(precision)
    mpu = spread_sequences(model, plan.layout, plan.batch) if plan.layout.sequence_parallel_size > 1 else None
    optimizer, rate = plan.recipe.optimizer, plan.recipe.training.learning_rate
    groups = parameter_groups(model, optimizer.weight_decay)
    if optimizer.layer_wise_lr_decay is not None or optimizer.unfreeze_every_steps is not None:
        groups = layered_groups(model, optimizer.weight_decay, rate, optimizer.layer_wise_lr_decay or 1.0)
    if plan.layout.expert_parallel_size > 1:
        upstream.let_auto_ep_capture_outputs()
        groups = upstream.named_groups(groups)
    if plan.zero_stage == 3:
        upstream.keep_no_input_of_frozen_matrices()
    if swap is not None:
        build_async_io()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=groups,
        optimizer=_own_optimizer(plan.deepspeed_config["optimizer"]),
        lr_scheduler=scheduler_factory(plan.recipe.training, max_steps),
        config=plan.deepspeed_config if swap is None else swap.config(plan.deepspeed_config),
        mpu=mpu,
    )
    if precision != "fp32" and plan.zero_stage == 0:
        upstream.forget_the_dummy_step(engine)
    if precision == "fp16":
        upstream.mend_the_loss_scale(engine, plan.zero_stage)
    if swap is not None:
        keep_whole_states(engine)
    return engine
