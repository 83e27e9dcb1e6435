"""Seconds of one optimizer step, from the model's shape, the layout and the hardware; pure arithmetic.

A micro batch takes the time of its matrix products, attention and elementwise kernels (roofline: FLOPs over the
reached rate, or bytes over the memory's bandwidth) and of the collectives inside its layers. Stages of a pipeline wait
for each other; gradients are reduced and parameters gathered as far as computation does not cover it.
"""

from dataclasses import dataclass

from launcher.planning import calibration
from launcher.planning.accelerators import Format, model_flops_per_token
from launcher.planning.calibration import attention_efficiency, matrix_efficiency
from launcher.planning.work import Machine, StepTime, Work

_HALF = 2
_HEAD_TRAFFIC = 24
"""Bytes that each logit moves: 16 bit out of the product, to fp32, log-softmax, and all of it back."""
_ADAM_TRAFFIC = 30
"""Bytes that AdamW moves for each parameter: reads a 16-bit gradient, reads and writes three fp32 states, writes the
16-bit weight, and a cast in between."""
_HOST_ADAM_TRAFFIC = 28
_BACKWARD_OVER_FORWARD = 2.0
_FUSED_ATTENTION = 3.5
"""Forward and backward of fused attention over its forward: 2 matrix products, then 5 (arXiv 2205.14135)."""
_COVERED = 0.9
"""No more than this share of the computation covers communication."""
_SCORE_TRAFFIC = 8
"""Passes over 16-bit scores that attention makes when it writes them out: product, mask, softmax, dropout and back."""


@dataclass(frozen=True)
class _Layer:
    """Seconds of one layer for one micro batch, forward and backward."""

    matrices: float
    attention: float
    elementwise: float
    tensor: float

    @property
    def seconds(self) -> float:
        return self.matrices + self.attention + self.elementwise + self.tensor


def step_time(work: Work, machine: Machine) -> StepTime:
    """Estimate one optimizer step.

    Raises:
        KeyError: the device does not compute in the number format.
    """
    layer, head = _layer(work, machine), _head(work, machine)
    layout, layers = work.layout, work.shape.num_hidden_layers
    stages = layout.pipeline_parallel_size
    micro = layers * layer.seconds + head
    slowest = max(-(-layers // stages) * layer.seconds, micro / stages) if stages > 1 else micro
    slowest += _boundary(work, machine)
    computing = work.micro_batches * slowest
    bubble = computing * (stages - 1) / (work.micro_batches * work.virtual_stages)
    share = layers / stages * work.micro_batches
    data = _data(work, machine, computing)
    even = work.micro_batches * micro / stages
    offload = _offload(work, machine)
    return StepTime(
        matrices=layer.matrices * share,
        attention=layer.attention * share,
        elementwise=layer.elementwise * share,
        head=head / stages * work.micro_batches,
        tensor=layer.tensor * share,
        pipeline=bubble + computing - even,
        data=data,
        optimizer=0.0 if work.offload_optimizer else _optimizer(work, machine) + machine.software.step_seconds,
        offload=offload,
        tokens=work.tokens_in_step,
        devices=layout.world_size,
        flops=float(model_flops_per_token(work.shape, work.sequence_length)) * work.tokens_in_step,
        peak=machine.accelerator.peak["bf16" if work.number_format == "fp8" else work.number_format],
    )


def _rate(work: Work, machine: Machine, narrow: float) -> float:
    """FLOP/s that matrix products reach whose smallest side is `narrow` or the number of tokens."""
    accelerator, number_format = machine.accelerator, work.number_format
    rate = accelerator.peak[number_format] * matrix_efficiency(accelerator, number_format)
    if number_format == "fp8":
        rate /= machine.software.fp8_cast
    return rate / (1 + calibration.SMALL_MATRIX / min(narrow, work.tokens))


def _half_rate(work: Work, machine: Machine) -> float:
    """FLOP/s of large products in 16 bit, or fp32 when the recipe trains in that."""
    number_format: Format = "bf16" if work.number_format == "fp8" else work.number_format
    return machine.accelerator.peak[number_format] * matrix_efficiency(machine.accelerator, number_format)


def _memory_rate(machine: Machine) -> float:
    return machine.accelerator.memory_bandwidth * calibration.MEMORY_EFFICIENCY


def _item(work: Work) -> int:
    """Bytes of an activation."""
    return 4 if work.number_format == "fp32" else _HALF


def _layer(work: Work, machine: Machine) -> _Layer:
    shape, layout, software, tokens = work.shape, work.layout, machine.software, work.tokens
    ranks = layout.tensor_parallel_size
    passes = 1 + _BACKWARD_OVER_FORWARD + work.recomputation
    hidden = shape.hidden_size
    per_token = 2 * shape.num_active_parameters_non_embedding / shape.num_hidden_layers / ranks
    matrices = passes * per_token * tokens / _rate(work, machine, hidden)
    heads = shape.num_attention_heads / ranks
    scores = 4 * heads * shape.head_dim * work.sequence_length * tokens
    if software.fused_attention:
        kernel = machine.accelerator.peak["bf16" if work.number_format == "fp8" else work.number_format]
        kernel *= attention_efficiency(machine.accelerator)
        attention = (_FUSED_ATTENTION + work.recomputation) * scores / 2 / kernel
    else:
        written = heads * work.sequence_length * tokens * _item(work)
        attention = passes * scores / _half_rate(work, machine)
        attention += (_SCORE_TRAFFIC + 3 * work.recomputation) * written / _memory_rate(machine)
    inner = shape.intermediate_size * (2 if work.gated else 1) * max(shape.num_experts_per_token, 1)
    moved = _item(work) * (16 * hidden + 2 * inner) * passes * tokens * software.traffic
    elementwise = moved * (software.divided / ranks + 1 - software.divided) / _memory_rate(machine)
    tensor = _inside_layers(work, machine)
    scale = max(1 / software.kernels, software.layer_seconds / (matrices + attention + elementwise + tensor))
    return _Layer(matrices * scale, attention * scale, elementwise * scale, tensor * scale)


def _inside_layers(work: Work, machine: Machine) -> float:
    """Communication of tensor, sequence and expert groups in one layer."""
    layout, shape, fabric = work.layout, work.shape, machine.fabric
    again = 1 + work.recomputation / 2
    stream = work.tokens * shape.hidden_size * _item(work)
    ranks = layout.tensor_parallel_size
    # Two sums in the forward pass, after attention and MLP, and two in the backward pass (arXiv 1909.08053).
    seconds = 4 * again * fabric.reduce(stream, ranks, 1) * (1 - machine.software.tensor_overlap)
    if layout.sequence_parallel_size > 1:
        # All-to-alls of queries, keys, values and the output (arXiv 2309.14509), and of their gradients.
        width = shape.head_dim * (2 * shape.num_attention_heads + 2 * shape.num_key_value_heads) / ranks
        part = width * work.tokens * _item(work)
        seconds += 2 * again * fabric.exchange(part, layout.sequence_parallel_size, ranks)
    if layout.expert_parallel_size > 1:
        sent = stream * shape.num_experts_per_token
        stride = ranks * layout.sequence_parallel_size
        seconds += 4 * again * fabric.exchange(sent, layout.expert_parallel_size, stride)
    return seconds


def _head(work: Work, machine: Machine) -> float:
    """Logits and loss of one micro batch."""
    shape = work.shape
    logits = work.tokens * shape.vocab_size / work.layout.tensor_parallel_size
    seconds = 6 * shape.hidden_size * logits / _half_rate(work, machine) + logits * _HEAD_TRAFFIC / _memory_rate(
        machine
    )
    return seconds / machine.software.kernels


def _boundary(work: Work, machine: Machine) -> float:
    """What a micro batch waits for its neighbours' activations and gradients; half of it runs under computation."""
    layout = work.layout
    if layout.pipeline_parallel_size == 1:
        return 0.0
    stride = layout.world_size // layout.pipeline_parallel_size
    parts = layout.tensor_parallel_size if machine.software.divided == 1.0 else 1
    stream = work.tokens * work.shape.hidden_size * _item(work) / parts
    return work.virtual_stages * machine.fabric.send(stream, stride)


def _rank_parameters(work: Work) -> float:
    """Parameters of a rank before ZeRO divides them."""
    shape, layout = work.shape, work.layout
    stages = layout.pipeline_parallel_size
    table = shape.vocab_size * shape.hidden_size
    edges = table if stages > 1 or shape.tie_word_embeddings else 2 * table
    inner = shape.num_parameters_non_embedding
    if layout.expert_parallel_size > 1 and shape.num_experts > shape.num_experts_per_token:
        chosen = shape.num_experts_per_token / shape.num_experts
        experts = (inner - shape.num_active_parameters_non_embedding) / (1 - chosen)
        inner -= int(experts * (1 - 1 / layout.expert_parallel_size))
    return (inner / stages + edges) / layout.tensor_parallel_size


def _data(work: Work, machine: Machine, computing: float) -> float:
    """Reducing gradients and gathering parameters, as far as no computation covers it."""
    layout, software, fabric = work.layout, machine.software, machine.fabric
    ranks = layout.data_parallel_size * layout.sequence_parallel_size
    stride, parameters = layout.tensor_parallel_size, _rank_parameters(work)
    scatter = fabric.gather(parameters * software.gradient_bytes, ranks, stride)
    gather = fabric.gather(parameters * _item(work), ranks, stride)
    times = work.micro_batches if work.reduces_every_micro_batch else 1
    if work.zero_stage == 3:
        # Pipelines keep what they gathered for all micro batches.
        every = (2 * gather + scatter) * times if layout.pipeline_parallel_size == 1 else gather + 2 * scatter
        return max(every * (1 - software.gather_overlap), every - _COVERED * computing)
    last = _COVERED * computing * min(layout.pipeline_parallel_size, work.micro_batches) / work.micro_batches
    if work.zero_stage in (1, 2):
        once = scatter * (times if work.zero_stage == 2 else 1) + gather
        return _exposed(once, software.partition_overlap, last)
    backward = last * _BACKWARD_OVER_FORWARD / (1 + _BACKWARD_OVER_FORWARD)
    return _exposed(2 * scatter, software.reduce_overlap, backward)


def _exposed(communication: float, overlap: float, computing: float) -> float:
    """What is left of communication that runs under at most so many seconds of computation."""
    return communication - min(communication * overlap, computing if overlap else 0.0)


def _optimizer(work: Work, machine: Machine) -> float:
    layout = work.layout
    ranks = layout.data_parallel_size * layout.sequence_parallel_size if work.zero_stage else 1
    return _rank_parameters(work) / ranks * _ADAM_TRAFFIC / _memory_rate(machine)


def _offload(work: Work, machine: Machine) -> float:
    """Gradients to the host, the update there, weights back; with offloaded parameters also their way to the device."""
    if not work.offload_optimizer and not work.offload_param:
        return 0.0
    layout = work.layout
    share = _rank_parameters(work) / (layout.data_parallel_size * layout.sequence_parallel_size)
    bus = machine.accelerator.host.bandwidth * calibration.INSIDE_EFFICIENCY
    seconds = 0.0
    if work.offload_optimizer:
        seconds += 2 * share * _item(work) / bus
        seconds += share * _HOST_ADAM_TRAFFIC * machine.workers_per_node / calibration.HOST_MEMORY_BANDWIDTH
    if work.offload_param:
        seconds += 2 * share * _item(work) * work.micro_batches / bus
    return seconds
