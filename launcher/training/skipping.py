"""Leaving out a step whose loss is bad: the gradients of its micro batches are thrown away, on every rank alike."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from launcher.planning.plan import Plan
from launcher.training.swap_folder import offload_section

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""Of DeepSpeed's engine, which its checkpoints hold."""


def why_not_in_place(plan: Plan, model: nn.Module) -> str | None:
    """Why a bad batch costs this run a restart; None: it is left out where the run is."""
    if plan.layout.pipeline_parallel_size > 1:
        return "a pipeline makes its step within DeepSpeed's schedule, before anybody has seen the loss"
    if offload_section(plan.deepspeed_config).get("device") == "nvme":
        return "gradients that are on their way to NVMe are not called back"
    normalised = (isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if any(normalised):
        return "the running statistics of batch normalisation have taken the batch in already"
    return None


def discard_step(engine: Any, zero_stage: int) -> None:
    """Throw away what a step's micro batches left, in the place of the last `engine.step()`.

    Under ZeRO it is the way that an overflow in fp16 takes (`runtime/zero/stage_1_and_2.py: step`, `runtime/zero/
    stage3.py: step`): accumulators, buckets and what Muon has staged are dropped; weights, states and schedule stay.
    Neither the loss scale nor the engine's counters take notice: it is as if the batch had never been.
    """
    if zero_stage == 0:
        engine.zero_grad()  # gradients lie in the parameters, whatever optimizer there is
        engine.micro_steps += 1
        return
    before = {name: getattr(engine, name) for name in COUNTERS}
    with _overflowing(engine.optimizer, zero_stage):
        engine.step()
    for name, value in before.items():
        setattr(engine, name, value)
    if zero_stage == 3:
        # What gets no gradient in the next step would be moved by what lies here.
        engine.optimizer.grad_partitions_flat_buffer.zero_()


@contextmanager
def _overflowing(optimizer: Any, zero_stage: int) -> Iterator[None]:
    """Have ZeRO's optimizer find an overflow, and no change of the loss scale come of it."""

    def find(*_: Any, **__: Any) -> bool:
        optimizer.overflow = True
        return True

    changed: dict[str, Callable[..., Any] | bool] = {"_update_scale": lambda overflow=False: None}
    if zero_stage == 3:
        changed["_overflow_check_and_loss_scale_update"] = find
    else:
        changed |= {"check_grad_overflow": True, "check_overflow": find}
    own = {name: vars(optimizer)[name] for name in changed if name in vars(optimizer)}
    vars(optimizer).update(changed)
    try:
        yield
    finally:
        for name in changed:
            del vars(optimizer)[name]
        vars(optimizer).update(own)
