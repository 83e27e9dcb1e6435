"""From a resolved recipe to what its ranks hold and how long a step takes: what the formulae need, read from it."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from launcher.errors import PlanError
from launcher.planning.accelerators import Accelerator, find_accelerator, find_network
from launcher.planning.activations import BYTES, ActivationSettings
from launcher.planning.calibration import OURS
from launcher.planning.deepspeed_config import DeepSpeedPlan
from launcher.planning.families import list_parameters
from launcher.planning.layers import LAYERS
from launcher.planning.layout import BatchPlan, Layout, Resources
from launcher.planning.memory import MemoryPlan, StateSettings, state_settings, uncounted_reason
from launcher.planning.model_shape import ModelShape
from launcher.planning.rank_memory import BufferSettings, RankMemory, activations_known, rank_memory, stage_states
from launcher.planning.sharding import shard
from launcher.planning.throughput import Machine, StepTime, Work, step_time
from launcher.planning.trained import Parts, layer_adapter, parts_of
from launcher.recipe.schema import Recipe

_REDUCED_UNDER_BACKWARD = 0.8
"""Share of the reductions of stage 1 and 2 that `overlap_comm` hides (as Megatron's own; not measured)."""


class StepEstimate(BaseModel):
    """How long a step takes, by the throughput model.

    Attributes:
        accelerator: for which.
        seconds: of a step.
        tokens_per_second_per_device: throughput.
        mfu: model FLOPs utilisation.
        parts: seconds by what they are spent on, in the words of `throughput.StepTime`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    accelerator: str
    seconds: float
    tokens_per_second_per_device: float
    mfu: float
    parts: dict[str, float]


def accelerator_of(resources: Resources) -> Accelerator | None:
    """What the workers compute on; `None` for GPUs that the profile does not name.

    Raises:
        PlanError: the name is not in the catalogue.
    """
    if resources.device == "cpu":
        return find_accelerator("CPU")
    return None if resources.accelerator is None else find_accelerator(resources.accelerator)


def machine_of(resources: Resources, deepspeed_config: Mapping[str, Any]) -> Machine | None:
    """Devices, links, and how DeepSpeed's settings use them; `None` when the accelerator is not known.

    Raises:
        PlanError: accelerator or network is not in the catalogue.
    """
    accelerator = accelerator_of(resources)
    if accelerator is None:
        return None
    network = None if resources.network is None else find_network(resources.network)
    overlap = _REDUCED_UNDER_BACKWARD if buffer_settings(deepspeed_config).overlap_comm else 0.0
    return Machine(accelerator, resources.workers_per_node, network, replace(OURS, partition_overlap=overlap))


def step_work(
    recipe: Recipe, config: Mapping[str, Any], shape: ModelShape, layout: Layout, batch: BatchPlan, zero: DeepSpeedPlan
) -> Work:
    """One optimizer step of a resolved recipe."""
    training = recipe.training
    layer = LAYERS.get(config["model_type"])
    return Work(
        shape=shape,
        gated=layer is None or layer.mlp in ("gated", "experts"),
        layout=layout,
        sequence_length=recipe.data.sequence_length,
        micro_batch_size=batch.micro_batch_size,
        micro_batches=batch.gradient_accumulation_steps,
        zero_stage=zero.zero_stage,
        number_format=training.precision,
        recomputation=1.0 if training.gradient_checkpointing else 0.0,
        offload_optimizer=zero.offload_optimizer != "none",
        offload_param=zero.offload_param != "none",
    )


def estimate_step(
    recipe: Recipe,
    config: Mapping[str, Any],
    shape: ModelShape,
    layout: Layout,
    batch: BatchPlan,
    deepspeed: DeepSpeedPlan,
    resources: Resources,
) -> StepEstimate | None:
    """How long a step takes; `None` when the accelerator is not known or does not compute in the precision."""
    try:
        machine = machine_of(resources, deepspeed.config)
    except PlanError:  # a plan can outlive the file that described its accelerator
        return None
    if machine is None or recipe.training.precision not in machine.accelerator.peak:
        return None
    step = step_time(step_work(recipe, config, shape, layout, batch, deepspeed), machine)
    return shown_step(step, machine.accelerator)


def shown_step(step: StepTime, accelerator: Accelerator) -> StepEstimate:
    """The same as a part of a plan."""
    return StepEstimate(
        accelerator=accelerator.name,
        seconds=step.seconds,
        tokens_per_second_per_device=step.tokens_per_second_per_device,
        mfu=step.mfu,
        parts=step.parts(),
    )


def estimate_ranks(
    recipe: Recipe,
    config: Mapping[str, Any],
    layout: Layout,
    batch: BatchPlan,
    deepspeed: DeepSpeedPlan,
    device: Literal["cpu", "cuda"],
) -> tuple[RankMemory, ...] | None:
    """What the ranks of each pipeline stage hold.

    Returns:
        One item a stage; `None` when a DeepSpeed setting, or the family's activations, are not counted.
    """
    if uncounted_reason(deepspeed.config) is not None or not activations_known(config):
        return None
    parts = parts_of(recipe, config)
    return tuple(
        rank_memory(
            config,
            parts.parameters,
            layout,
            rank_states(recipe, layout, deepspeed),
            replace(
                activation_settings(recipe, layout, batch, deepspeed.config, device),
                micro_batch_size=batch.micro_batch_size * parts.rows,
                adapter=layer_adapter(recipe, config),
            ),
            buffer_settings(deepspeed.config),
            parts.frozen,
            _reference_bytes(parts, config, recipe),
        )
    )


def states_by_zero_stage(
    recipe: Recipe, config: Mapping[str, Any], layout: Layout, deepspeed: DeepSpeedPlan
) -> dict[int, MemoryPlan]:
    """Model states of the fullest rank under each ZeRO stage, with offload where a stage has something to offload."""
    parts = parts_of(recipe, config)
    stages = shard(parts.parameters, layout, vocabulary_parallel(deepspeed.config), parts.frozen)
    fullest = max(stages, key=lambda stage: stage.num_parameters)
    settings, experts = rank_states(recipe, layout, deepspeed), layout.expert_parallel_size
    references = _reference_bytes(parts, config, recipe)
    return {stage: stage_states(fullest, settings.with_stage(stage), experts, references) for stage in range(4)}


def _reference_bytes(parts: Parts, config: Mapping[str, Any], recipe: Recipe) -> int:
    elements = sum(tensor.numel for tensor in list_parameters(config))
    return parts.references * elements * BYTES[recipe.training.precision]


def rank_states(recipe: Recipe, layout: Layout, deepspeed: DeepSpeedPlan) -> StateSettings:
    """Settings of the model states: ZeRO divides them among data- and sequence-parallel ranks alike."""
    replicas = layout.data_parallel_size * layout.sequence_parallel_size
    importance = recipe.optimizer.ewc is not None
    copies = (recipe.training.ema is not None) + (recipe.optimizer.decay_to_start > 0 or importance) + importance
    return state_settings(deepspeed, recipe.training.precision, replicas, copies=copies)


def activation_settings(
    recipe: Recipe,
    layout: Layout,
    batch: BatchPlan,
    deepspeed_config: Mapping[str, Any],
    device: Literal["cpu", "cuda"],
) -> ActivationSettings:
    """Settings of the activations."""
    data, model, training = recipe.data, recipe.model, recipe.training
    balance = training.router_aux_loss_coef
    return ActivationSettings(
        precision=training.precision,
        micro_batch_size=batch.micro_batch_size,
        sequence_length=data.sequence_length,
        attention=model.attn_implementation,
        packed=data.packing != "none" and not data.cross_document_attention,
        gradient_checkpointing=training.gradient_checkpointing,
        mlp_tiles=training.mlp_tiles,
        loss_tiles=training.loss_tiles,
        balances_experts=None if balance is None else balance > 0,
        tensor_parallel_size=layout.tensor_parallel_size,
        sequence_parallel_size=layout.sequence_parallel_size,
        vocabulary_parallel=vocabulary_parallel(deepspeed_config),
        device=device,
    )


def buffer_settings(deepspeed_config: Mapping[str, Any]) -> BufferSettings:
    """Bucket sizes, as DeepSpeed reads them: with or without the prefix of stage 3."""
    zero = deepspeed_config.get("zero_optimization", {})
    stage_3 = zero.get("stage") == 3

    def size(name: str, default: int) -> int:
        return int(min(zero.get(f"stage3_{name}", zero.get(name, default)), sys.maxsize))

    default = BufferSettings()
    overlap = zero.get("overlap_comm")
    return BufferSettings(
        reduce_bucket_size=size("reduce_bucket_size", default.reduce_bucket_size),
        overlap_comm=stage_3 if overlap is None else bool(overlap),
        sub_group_size=size("sub_group_size", default.sub_group_size),
        max_live_parameters=size("max_live_parameters", default.max_live_parameters),
        prefetch_bucket_size=size("prefetch_bucket_size", default.prefetch_bucket_size),
    )


def vocabulary_parallel(deepspeed_config: Mapping[str, Any]) -> bool:
    """Whether tensor-parallel ranks share the head; they do unless the config says no."""
    return deepspeed_config.get("tensor_parallel", {}).get("vocab_parallel_lm_head") is not False
