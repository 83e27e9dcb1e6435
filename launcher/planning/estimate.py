"""From a resolved recipe to what its ranks hold: the settings that the formulae take, read from recipe and config."""

import sys
from collections.abc import Mapping
from typing import Any, Literal

from launcher.planning.activations import ActivationSettings
from launcher.planning.deepspeed_config import DeepSpeedPlan
from launcher.planning.families import list_parameters
from launcher.planning.layout import BatchPlan, Layout
from launcher.planning.memory import MemoryPlan, StateSettings, state_settings, uncounted_reason
from launcher.planning.rank_memory import BufferSettings, RankMemory, activations_known, rank_memory, stage_states
from launcher.planning.sharding import shard
from launcher.recipe.schema import Recipe


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
    return tuple(
        rank_memory(
            config,
            list_parameters(config),
            layout,
            rank_states(recipe, layout, deepspeed),
            activation_settings(recipe, layout, batch, deepspeed.config, device),
            buffer_settings(deepspeed.config),
        )
    )


def states_by_zero_stage(
    recipe: Recipe, config: Mapping[str, Any], layout: Layout, deepspeed: DeepSpeedPlan
) -> dict[int, MemoryPlan]:
    """Model states of the fullest rank under each ZeRO stage, with offload where a stage has something to offload."""
    stages = shard(list_parameters(config), layout, vocabulary_parallel(deepspeed.config))
    fullest = max(stages, key=lambda stage: stage.num_parameters)
    settings = rank_states(recipe, layout, deepspeed)
    return {stage: stage_states(fullest, settings.with_stage(stage), layout.expert_parallel_size) for stage in range(4)}


def rank_states(recipe: Recipe, layout: Layout, deepspeed: DeepSpeedPlan) -> StateSettings:
    """Settings of the model states: ZeRO divides them among data- and sequence-parallel ranks alike."""
    replicas = layout.data_parallel_size * layout.sequence_parallel_size
    return state_settings(deepspeed, recipe.training.precision, replicas)


def activation_settings(
    recipe: Recipe,
    layout: Layout,
    batch: BatchPlan,
    deepspeed_config: Mapping[str, Any],
    device: Literal["cpu", "cuda"],
) -> ActivationSettings:
    """Settings of the activations."""
    data, model = recipe.data, recipe.model
    return ActivationSettings(
        precision=recipe.training.precision,
        micro_batch_size=batch.micro_batch_size,
        sequence_length=data.sequence_length,
        attention=model.attn_implementation,
        packed=data.packing != "none" and not data.cross_document_attention,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
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
