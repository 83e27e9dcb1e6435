"""The DeepSpeed engine of a plan: parameter groups, schedule, `deepspeed.initialize`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from launcher.errors import RecipeError
from launcher.models.sequence import spread_sequences
from launcher.planning.plan import Plan
from launcher.recipe.schema import TrainingSection
from launcher.training import upstream


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


def build_engine(plan: Plan, model: nn.Module, max_steps: int) -> Any:
    """Initialise DeepSpeed on a model, on every rank.

    Returns:
        The `DeepSpeedEngine`, with optimizer and schedule inside.

    Raises:
        RecipeError: the device does not compute in the plan's precision, or the schedule is not known.
    """
    import deepspeed

    check_precision(plan.recipe.training.precision)
    if plan.layout.expert_parallel_size > 1:
        upstream.let_auto_ep_capture_outputs()
    mpu = spread_sequences(model, plan.layout, plan.batch) if plan.layout.sequence_parallel_size > 1 else None
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model, plan.recipe.optimizer.weight_decay),
        lr_scheduler=scheduler_factory(plan.recipe.training, max_steps),
        config=plan.deepspeed_config,
        mpu=mpu,
    )
    return engine
