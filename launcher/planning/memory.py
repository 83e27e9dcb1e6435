"""Bytes per rank of the model states under ZeRO 0-3, as DeepSpeed 0.19.8 allocates them for AdamW.

Counted are weights, gradients and optimizer states that live from step to step. Not counted: activations, the
communication buckets (`reduce_bucket_size` elements, kept for good under stage 3), gathered parameters, and Adam's step
counters (4 bytes a tensor). The tests compare every formula with the live tensors of two real ranks.
"""

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from launcher.planning.deepspeed_config import DeepSpeedPlan
from launcher.planning.parameters import ParameterTensor

_FP32 = 4
_ADAM_MOMENTS = 2 * _FP32
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_PARTITION_ALIGNMENT = 2
"""Elements: `nccl_start_alignment_factor` of `runtime/zero/stage_1_and_2.py`."""


class MemoryPlan(BaseModel):
    """Bytes on the fullest rank (all ranks are alike under ZeRO up to rounding).

    Attributes:
        parameters: the weights that forward and backward use.
        gradients: as kept between two micro batches.
        optimizer: fp32 copy of the weights (16-bit training) and the optimizer's moments.
        host_parameters: weights in host memory: the rank's share under parameter offload, and the copy through which an
            offloaded optimizer hands its result back under stages 1 and 2.
        host_gradients: the part of the gradients that is in host memory when the optimizer is offloaded.
        host_optimizer: the part of the optimizer states that is offloaded to host memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int
    gradients: int
    optimizer: int
    host_parameters: int = 0
    host_gradients: int = 0
    host_optimizer: int = 0

    @property
    def device_bytes(self) -> int:
        """What lies on the device."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def host_bytes(self) -> int:
        """What lies in host memory besides."""
        return self.host_parameters + self.host_gradients + self.host_optimizer


@dataclass(frozen=True)
class StateSettings:
    """What the sizes of the model states depend on.

    Attributes:
        persistence_threshold: stage 3 keeps parameters of at most so many elements whole on every rank ...
        model_persistence_threshold: ... as long as they are not more than this together.
        copies: so many further fp32 copies of the weights are kept (`training.ema`, `optimizer.decay_to_start` or
            `.ewc`).
    """

    zero_stage: int
    precision: Literal["fp32", "bf16", "fp16"]
    data_parallel_size: int
    gradient_accumulation_steps: int = 1
    offload_optimizer: bool = False
    offload_param: bool = False
    persistence_threshold: int = 100_000
    model_persistence_threshold: int = sys.maxsize
    copies: int = 0

    @property
    def moments(self) -> int:
        """Bytes of each weight's optimizer states, besides an fp32 copy of it."""
        return _ADAM_MOMENTS + self.copies * _FP32

    def with_stage(self, zero_stage: int) -> "StateSettings":
        """The same under another stage, with offload where that stage has something to offload."""
        return replace(
            self,
            zero_stage=zero_stage,
            offload_optimizer=self.offload_optimizer and zero_stage > 0,
            offload_param=self.offload_param and zero_stage == 3,
        )


def state_settings(
    deepspeed: DeepSpeedPlan,
    precision: Literal["fp32", "bf16", "fp16"],
    data_parallel_size: int,
    *,
    copies: int = 0,
) -> StateSettings:
    """Read the settings from a resolved DeepSpeed config."""
    zero = deepspeed.config["zero_optimization"]
    persistence, model_persistence = (
        zero.get(f"stage3_{name}", zero.get(name, default))
        for name, default in (("param_persistence_threshold", 100_000), ("model_persistence_threshold", sys.maxsize))
    )
    return StateSettings(
        zero_stage=deepspeed.zero_stage,
        precision=precision,
        data_parallel_size=data_parallel_size,
        gradient_accumulation_steps=deepspeed.config["gradient_accumulation_steps"],
        offload_optimizer=deepspeed.offload_optimizer == "cpu",
        offload_param=deepspeed.offload_param == "cpu",
        persistence_threshold=int(persistence),
        model_persistence_threshold=int(model_persistence),
        copies=copies,
    )


_COUNTED_AT: dict[str, tuple[Any, ...]] = {
    "bf16.bf16_master_weights_and_grads": (False,),
    "data_types.grad_accum_dtype": (None,),
    "fp16.fp16_master_weights_and_grads": (False,),
    "optimizer.params.amsgrad": (False, None),
    "optimizer.type": ("AdamW", "adamw"),
    "torch_autocast.enabled": (False,),
    "zero_optimization.contiguous_gradients": (True,),
    "zero_optimization.offload_optimizer.device": ("none", "cpu"),
    "zero_optimization.offload_optimizer.ratio": (1, 1.0),
    "zero_optimization.offload_optimizer.super_offload": (False,),
    "zero_optimization.offload_param.device": ("none", "cpu"),
    "zero_optimization.parameter_alignment": (False,),
    "zero_optimization.round_robin_gradients": (False,),
    "zero_optimization.zenflow": (None,),
    "zero_optimization.zero_hpz_partition_size": (1,),
    "zero_optimization.zero_quantized_nontrainable_weights": (False,),
}
"""Keys that change the sizes of the states -> the values for which the formulas here hold."""


def uncounted_reason(config: Mapping[str, Any]) -> str | None:
    """Say which setting of a DeepSpeed config the formulas do not cover; `None` when they cover it."""
    for path, counted in _COUNTED_AT.items():
        value: Any = config
        for key in path.split("."):
            value = value.get(key, counted[0]) if isinstance(value, Mapping) else counted[0]
        if value not in counted:
            return f"{path} = {value!r} is not counted"
    return None


def memory_plan(parameters: Sequence[ParameterTensor], settings: StateSettings) -> MemoryPlan:
    """Bytes of the model states on the fullest rank.

    Args:
        parameters: of the whole model, in the order of `named_parameters()`, all of them trained.
        settings: stage, precision, sizes and offload.
    """
    if settings.zero_stage == 0:
        return _stage_0(parameters, settings)
    if settings.zero_stage == 3:
        return _stage_3(parameters, settings)
    return _stage_1_and_2(parameters, settings)


def _stage_0(parameters: Sequence[ParameterTensor], settings: StateSettings) -> MemoryPlan:
    """Everything on every rank.

    fp32 trains the weights themselves; 16 bit keeps an fp32 copy of each tensor besides
    (`runtime/fp16/unfused_optimizer.py`: `fp32_group`).
    """
    elements, size = sum(tensor.numel for tensor in parameters), _BYTES[settings.precision]
    master = 0 if settings.precision == "fp32" else _FP32
    return MemoryPlan(
        parameters=elements * size, gradients=elements * size, optimizer=elements * (master + settings.moments)
    )


def _stage_1_and_2(parameters: Sequence[ParameterTensor], settings: StateSettings) -> MemoryPlan:
    """Optimizer states in equal partitions of each parameter group's flat buffer (`runtime/zero/stage_1_and_2.py`).

    The flat buffer is padded to a multiple of 2 x ranks. Each rank clones its partition to fp32 whatever the precision
    (`single_partition_of_fp32_groups`), so fp32 has a second copy here. Gradients accumulate whole under stage 1
    (reduced on the last micro batch only). Stage 2 keeps those of every tensor that reaches into the partition, whole
    tensors (`copy_grads_in_partition`), so one large embedding on a rank's border is kept whole by both neighbours.

    Offload moves the optimizer to the host, with an fp32 gradient of the partition that stays, a staging copy of the
    weights (`param_buffer_of_bit16_for_cpu_offload_groups`) and, under stage 2 with accumulation, the accumulated
    gradients.
    """
    item, ranks = _BYTES[settings.precision], settings.data_parallel_size
    groups = [[tensor.numel for tensor in group] for group in parameter_groups(parameters)]
    partitions = [_partition(sum(group), ranks) for group in groups]
    partition = sum(partitions)
    elements = sum(tensor.numel for tensor in parameters)
    per_group = [_reached(group, size, ranks) for group, size in zip(groups, partitions, strict=True)]
    reached = max(map(sum, zip(*per_group, strict=True)), default=0)  # nothing is trained where a pattern is misspelt
    weights = partition * ranks * item
    states = partition * (_FP32 + settings.moments)
    if not settings.offload_optimizer:
        kept = elements if settings.zero_stage == 1 else reached
        return MemoryPlan(parameters=weights, gradients=kept * item, optimizer=states)
    accumulated = reached if settings.zero_stage == 2 and settings.gradient_accumulation_steps > 1 else 0
    return MemoryPlan(
        parameters=weights,
        gradients=elements * item if settings.zero_stage == 1 else 0,
        optimizer=0,
        host_parameters=partition * item,
        host_gradients=partition * _FP32 + accumulated * item,
        host_optimizer=states,
    )


def _stage_3(parameters: Sequence[ParameterTensor], settings: StateSettings) -> MemoryPlan:
    """Each parameter in equal partitions, rounded up (`runtime/zero/partition_parameters.py`: `_aligned_size`).

    Parameters of at most `persistence_threshold` elements are kept whole besides, from the first forward on
    (`parameter_offload.py: mark_persistent_parameters`); a single rank's share is the whole, and is used in place. The
    fp32 copy is made in fp32 training too. Gradients have a flat buffer of their own (`grad_partitions_flat_buffer`)
    in the weights' precision; offload puts it and an fp32 gradient of every partition in host memory
    (`runtime/zero/stage3.py`).
    """
    size, ranks = _BYTES[settings.precision], settings.data_parallel_size
    shares = sum(-(-tensor.numel // ranks) for tensor in parameters)
    persistent = _persistent(parameters, settings)
    states = shares * (_FP32 + settings.moments)
    on_host = settings.offload_optimizer
    return MemoryPlan(
        parameters=(persistent + (0 if settings.offload_param else shares)) * size,
        gradients=0 if on_host else shares * size,
        optimizer=0 if on_host else states,
        host_parameters=shares * size if settings.offload_param else 0,
        host_gradients=shares * (size + _FP32) if on_host else 0,
        host_optimizer=states if on_host else 0,
    )


def _persistent(parameters: Sequence[ParameterTensor], settings: StateSettings) -> int:
    """Elements that stage 3 keeps whole on every rank."""
    if settings.data_parallel_size == 1 and not settings.offload_param:
        return 0
    kept = 0
    for tensor in parameters:
        together = kept + tensor.numel
        if tensor.numel <= settings.persistence_threshold and together <= settings.model_persistence_threshold:
            kept = together
    return kept


def frozen_bytes(parameters: Sequence[ParameterTensor], settings: StateSettings) -> tuple[int, int]:
    """Bytes (on the device, on the host) of weights that are only used; stage 3 divides them too."""
    size, ranks = _BYTES[settings.precision], settings.data_parallel_size
    if settings.zero_stage < 3:
        return sum(tensor.numel for tensor in parameters) * size, 0
    shares = sum(-(-tensor.numel // ranks) for tensor in parameters)
    whole = _persistent(parameters, settings)
    if settings.offload_param:
        return whole * size, shares * size
    return (whole + shares) * size, 0


def parameter_groups(parameters: Iterable[ParameterTensor]) -> list[list[ParameterTensor]]:
    """Split as the optimizer's groups are: decayed matrices, and everything of one dimension; none is empty."""
    decayed: list[ParameterTensor] = []
    others: list[ParameterTensor] = []
    for tensor in parameters:
        (decayed if len(tensor.shape) > 1 else others).append(tensor)
    return [group for group in (decayed, others) if group]


def _partition(elements: int, ranks: int) -> int:
    """Elements of one rank's partition of a flat buffer."""
    alignment = _PARTITION_ALIGNMENT * ranks
    return -(-elements // alignment) * _PARTITION_ALIGNMENT


def _reached(sizes: Sequence[int], partition: int, ranks: int) -> list[int]:
    """For each rank, the elements of all tensors that reach into its partition, whole tensors."""
    reached = [0] * ranks
    for size, end in zip(sizes, itertools.accumulate(sizes), strict=True):
        for rank in range((end - size) // partition, (end - 1) // partition + 1):
            reached[rank] += size
    return reached
