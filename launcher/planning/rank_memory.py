"""Everything that a rank holds, by pipeline stage: model states, activations, loss, buffers, and the framework's share.

Two moments decide whether it fits: the backward pass of the oldest micro batch, when all activations and the loss are
alive, and the optimizer step, when they are gone and DeepSpeed holds copies of the gradients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from launcher.planning.activations import BYTES, ActivationModel, ActivationSettings
from launcher.planning.layers import LAYERS
from launcher.planning.layout import Layout
from launcher.planning.memory import MemoryPlan, StateSettings, frozen_bytes, memory_plan
from launcher.planning.parameters import ParameterTensor
from launcher.planning.sharding import StageParameters, shard

_FP32 = 4
_MIB = 1 << 20
CUDA_CONTEXT = 600 * _MIB
"""What CUDA itself takes on a recent GPU before the first tensor, with cuBLAS's workspace (32 MiB on Hopper, cuBLAS
documentation, cublasSetWorkspace): what nvidia-smi shows of a process that holds one small matrix product."""
COMMUNICATOR = 200 * _MIB
"""Buffers of one NCCL communicator: up to 32 channels, each with a buffer of `NCCL_BUFFSIZE` (4 MiB) and the smaller
ones of the LL and LL128 protocols to send and to receive (NCCL documentation, environment variables)."""


@dataclass(frozen=True)
class BufferSettings:
    """DeepSpeed's settings of the same names, in elements; the defaults are its own (`runtime/zero/config.py`)."""

    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    sub_group_size: int = 1_000_000_000
    max_live_parameters: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000


class RankMemory(BaseModel):
    """Bytes on each rank of one pipeline stage.

    Attributes:
        stage: of the pipeline, from 0.
        num_layers: decoder layers of the stage.
        num_parameters: of the rank's shard, before ZeRO divides it further.
        states: weights, gradients and optimizer states that live from step to step.
        activations: what all micro batches in flight have saved for their backward pass.
        loss: logits and their gradients, on the last stage; beyond what `activations` holds of them.
        recomputation: one layer's activations made again, and the gradients inside of it.
        gradient: the largest gradient, between the moment that it is made and the moment that it is reduced.
        buffers: ZeRO's buckets and gathered parameters.
        step_buffers: copies of gradients during the optimizer step.
        overhead: CUDA and NCCL; 0 on CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: int
    num_layers: int
    num_parameters: int
    states: MemoryPlan
    activations: int
    loss: int
    recomputation: int
    gradient: int
    buffers: int
    step_buffers: int
    overhead: int

    @property
    def backward_bytes(self) -> int:
        """On the device, at the fullest moment of the backward pass."""
        moving = self.activations + max(self.loss, self.recomputation, self.gradient)
        return self.states.device_bytes + moving + self.buffers + self.overhead

    @property
    def step_bytes(self) -> int:
        """On the device, during the optimizer step."""
        return self.states.device_bytes + self.step_buffers + self.overhead

    @property
    def device_bytes(self) -> int:
        """On the device, at most."""
        return max(self.backward_bytes, self.step_bytes)

    @property
    def host_bytes(self) -> int:
        """In host memory: what is offloaded."""
        return self.states.host_bytes

    @property
    def nvme_bytes(self) -> int:
        """In files, at most."""
        return self.states.nvme


def in_flight(stage: int, stages: int, micro_batches: int) -> int:
    """Micro batches whose activations a stage holds under 1F1B (arXiv 2104.04473, section 2.2.1)."""
    return min(micro_batches, stages - stage)


def rank_memory(
    config: Mapping[str, Any],
    parameters: Sequence[ParameterTensor],
    layout: Layout,
    states: StateSettings,
    activations: ActivationSettings,
    buffers: BufferSettings | None = None,
    frozen: frozenset[str] = frozenset(),
    references: int = 0,
) -> list[RankMemory]:
    """Bytes on the ranks of each pipeline stage.

    Args:
        config: a transformers config of a family whose activations are known (`activations.LAYERS`).
        parameters: in the order of `named_parameters()`, those of an adapter too.
        layout: sizes of the groups.
        states: its data-parallel size is that of the layout, times the sequence-parallel one, whose ranks ZeRO counts
            in as well.
        activations: its tensor- and sequence-parallel sizes are those of the layout.
        buffers: DeepSpeed's bucket sizes.
        frozen: names of weights that are used and not trained.
        references: bytes of models that each rank holds whole besides.
    """
    stages = shard(parameters, layout, activations.vocabulary_parallel, frozen)
    model = ActivationModel(config, activations)
    return [
        stage_memory(
            index,
            held,
            stage_states(held, states, layout.expert_parallel_size, references),
            model,
            layout,
            states,
            buffers,
        )
        for index, held in enumerate(stages)
    ]


def stage_memory(
    index: int,
    held: StageParameters,
    states: MemoryPlan,
    model: ActivationModel,
    layout: Layout,
    settings: StateSettings,
    buffers: BufferSettings | None = None,
) -> RankMemory:
    """Bytes on each rank of one pipeline stage whose model states are known."""
    buffers = buffers or BufferSettings()
    stages = layout.pipeline_parallel_size
    batches = in_flight(index, stages, settings.gradient_accumulation_steps)
    sparse = held.num_sparse_layers
    layers = [(sparse, model.decoder_layer(sparse=True)), (held.num_layers - sparse, model.decoder_layer(sparse=False))]
    edges = model.edges()
    kept = edges.first + sum(number * layer.saved for number, layer in layers)
    if stages > 1:  # a stage's input and output are kept besides, for the gradients that come back to them
        kept += 2 * model.settings.tokens * model.width * model.hidden
    working = max(layer.recomputed + layer.backward for number, layer in layers if number)
    working += held.largest_in_layers * model.width
    gathered, permanent = _parameter_buffers(held, settings, buffers)
    return RankMemory(
        stage=index,
        num_layers=held.num_layers,
        num_parameters=held.num_parameters,
        states=states,
        activations=batches * kept + (edges.last if held.has_head else 0),
        loss=edges.loss if held.has_head else 0,
        recomputation=int(working),
        gradient=held.largest * model.width,
        buffers=gathered + permanent + _reduction_buffers(settings, buffers),
        step_buffers=permanent + _step_buffers(held, settings, buffers),
        overhead=_overhead(layout) if model.settings.device == "cuda" else 0,
    )


def stage_states(
    held: StageParameters, settings: StateSettings, expert_parallel_size: int = 1, references: int = 0
) -> MemoryPlan:
    """Model states of a stage's ranks; experts have fewer replicas to divide theirs among.

    Args:
        held: by each of them.
        settings: stage, precision, sizes and offload.
        expert_parallel_size: ranks that share experts.
        references: bytes of models that each rank holds whole besides, whatever the stage and its offload.
    """
    if expert_parallel_size == 1 or not held.experts:
        plan = memory_plan(held.parameters, settings)
    else:
        plan = memory_plan(held.dense, settings)
        replicas = max(settings.data_parallel_size // expert_parallel_size, 1)
        experts = memory_plan(held.experts, replace(settings, data_parallel_size=replicas))
        plan = MemoryPlan(**{name: getattr(plan, name) + getattr(experts, name) for name in MemoryPlan.model_fields})
    device, host = frozen_bytes(held.frozen, settings)
    unused = {
        "parameters": plan.parameters + device + references, "host_parameters": plan.host_parameters + host
    }  # fmt: skip
    return plan.model_copy(update=unused)


def _parameter_buffers(held: StageParameters, settings: StateSettings, buffers: BufferSettings) -> tuple[int, int]:
    """(Gathered parameters, permanent bucket) of stage 3; other stages keep whole parameters anyway.

    `runtime/zero/partitioned_param_coordinator.py` keeps gathered parameters until `max_live_parameters`, and fetches
    `prefetch_bucket_size` ahead; `runtime/zero/stage3.py` holds one bucket for reductions from the start.
    """
    if settings.zero_stage != 3:
        return 0, 0
    size = BYTES[settings.precision]
    alone = settings.data_parallel_size == 1 and not settings.offload_param
    live = min(held.num_parameters, buffers.max_live_parameters + buffers.prefetch_bucket_size)
    return 0 if alone else live * size, buffers.reduce_bucket_size * size


def _reduction_buffers(settings: StateSettings, buffers: BufferSettings) -> int:
    """What gradients pass through before they are kept: stages 1 and 2 make it anew in every backward pass."""
    if settings.zero_stage not in (1, 2):
        return 0
    return buffers.reduce_bucket_size * BYTES[settings.precision] * (2 if buffers.overlap_comm else 1)


def _step_buffers(held: StageParameters, settings: StateSettings, buffers: BufferSettings) -> int:
    """Gradients flattened, and cast to fp32, before the optimizer's kernel runs on them.

    Stage 0 flattens for its all-reduce (`engine.buffered_allreduce_fallback`); stages 1 and 2 flatten and cast the
    whole partition (`stage_1_and_2.py: step`); stage 3 casts one subgroup at a time (`stage3.py: _prepare_sub_group`).
    """
    size = BYTES[settings.precision]
    cast = 0 if settings.precision == "fp32" else _FP32
    elements = held.num_trained
    if settings.zero_stage == 0:
        return min(elements, buffers.reduce_bucket_size) * size if settings.data_parallel_size > 1 else 0
    if settings.offload_optimizer:
        return 0
    partition = -(-elements // settings.data_parallel_size)
    if settings.zero_stage == 3:
        return min(partition, buffers.sub_group_size) * (cast or size)
    return partition * (size + cast)


def _overhead(layout: Layout) -> int:
    groups = (
        layout.data_parallel_size,
        layout.tensor_parallel_size,
        layout.pipeline_parallel_size,
        layout.sequence_parallel_size,
        layout.expert_parallel_size,
    )
    communicators = 1 + sum(1 for size in groups if size > 1) if layout.world_size > 1 else 0
    return CUDA_CONTEXT + communicators * COMMUNICATOR


def activations_known(config: Mapping[str, Any]) -> bool:
    """Whether the family's activations can be counted."""
    return config.get("model_type") in LAYERS
