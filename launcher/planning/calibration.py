"""The constants of the throughput model that no data sheet gives, and the training programs that they describe.

`benchmarks/throughput_error.py --fit` finds the fitted ones on the rows of `published_throughput.csv` that are marked
for it, a third of all, and `docs/planning.md` says how far the model is from the others. The rest are assumptions; each
says so.
"""

from dataclasses import dataclass

from launcher.planning.accelerators import Accelerator, Format

MATRIX_EFFICIENCY: dict[str, dict[Format, float]] = {
    "A100": {"bf16": 0.863, "fp16": 0.863, "fp32": 0.85},
    "H100": {"bf16": 0.699, "fp16": 0.699, "fp32": 0.80, "fp8": 0.589},
}
"""Share of the peak that large matrix products reach, fitted in 16 bit and fp8. H100s lose more: their power limit
lowers the clock under load."""
LIKE = {"A100": "A100", "L40S": "A100", "RTX4090": "A100", "H100": "H100", "H200": "H100", "B200": "H100"}
"""Devices without rows of their own are assumed to be like these."""
ASSUMED_EFFICIENCY = 0.6
"""Of devices like neither."""

SMALL_MATRIX = 300.0
"""Elements: a product whose smallest side is `d` takes `1 + SMALL_MATRIX / d` times as long (assumed; tiles of 128 and
their last, partly empty wave)."""
ATTENTION_EFFICIENCY = {"A100": 0.55, "H100": 0.40}
"""Share of the peak of fused attention kernels, forward and backward together (FlashAttention-2, arXiv 2307.08691,
figures 4 to 6: 50 to 60 % on A100 for causal masks; about 350 TFLOP/s on H100, whose newer instructions it does not
use)."""
MEMORY_EFFICIENCY = 0.80
"""Share of the memory bandwidth that elementwise kernels reach (assumed; STREAM-like kernels reach 80 to 90 %)."""
INSIDE_EFFICIENCY = 0.75
"""Share of NVLink's bandwidth that collectives reach (assumed; nccl-tests show 70 to 80 % for large messages)."""
OUTSIDE_EFFICIENCY = 0.696
"""The same between nodes; fitted."""
CONGESTION: dict[str, float] = {"EFA-400": 0.055, "EFA-50": 0.055}
"""Share by which each further node of a group lengthens its collectives, by network; fitted on 512 GPUs."""
HOST_MEMORY_BANDWIDTH = 200e9
"""Bytes a second of a node's host memory, which its workers share in an offloaded optimizer step (assumed: eight
channels of DDR5-4800 at two thirds of their peak)."""


@dataclass(frozen=True)
class Software:
    """How well one training program uses its hardware.

    Attributes:
        name: of the program.
        kernels: share of the time that the model's kernels would take by the rates above; fitted.
        traffic: of elementwise kernels, as a multiple of what fused norms, activations and residuals move (assumed).
        divided: share of the elementwise traffic that tensor-parallel ranks divide: 1 with Megatron's sequence
            parallelism (arXiv 2205.05198), else the part between a column- and a row-parallel matrix.
        tensor_overlap: share of tensor-parallel communication that runs under matrix products.
        reduce_overlap: share of stage 0's reduction of gradients that runs under the last backward pass.
        partition_overlap: share of stage 1's and 2's reductions and gathers that runs under computation.
        gather_overlap: share of stage 3's gathers and reductions that runs under computation.
        gradient_bytes: of one element in the reduction.
        fused_attention: attention scores never leave the chip.
        layer_seconds: what the host takes to launch a layer's kernels, forward and backward; no layer is faster.
        step_seconds: of a step outside of all that.
        fp8_cast: factor on fp8 products for casts that are not fused into them; fitted.
    """

    name: str
    kernels: float
    traffic: float = 1.0
    divided: float = 0.5
    tensor_overlap: float = 0.0
    reduce_overlap: float = 0.0
    partition_overlap: float = 0.0
    gather_overlap: float = 0.9
    gradient_bytes: int = 2
    fused_attention: bool = True
    layer_seconds: float = 1e-3
    step_seconds: float = 0.0
    fp8_cast: float = 1.0


SOFTWARE: dict[str, Software] = {
    software.name: software
    for software in (
        Software("megatron-2021", kernels=0.941, fused_attention=False),
        Software("megatron-deepspeed", kernels=0.657, fused_attention=False),
        Software(
            "megatron-core", kernels=0.913, traffic=0.7, divided=1.0, tensor_overlap=0.7, reduce_overlap=0.9,
            partition_overlap=0.8, gradient_bytes=4,
        ),
        Software(
            "nanotron", kernels=0.752, divided=1.0, tensor_overlap=0.5, reduce_overlap=0.9, gradient_bytes=4,
            step_seconds=0.023,
        ),
        Software("torch-compile", kernels=0.895, traffic=0.7, fp8_cast=1.344),
        Software("torch-eager", kernels=0.814, traffic=1.2),
    )
}  # fmt: skip
"""Programs whose published throughput the model is compared with."""

OURS = SOFTWARE["torch-eager"]
"""What runs here, transformers' modules under DeepSpeed, uses PyTorch's own kernels one by one, as llm-foundry and
torchtitan without compilation do."""


def matrix_efficiency(accelerator: Accelerator, number_format: Format) -> float:
    """Share of the peak that large matrix products reach on a device."""
    family = _family(accelerator)
    return ASSUMED_EFFICIENCY if family is None else MATRIX_EFFICIENCY[family].get(number_format, ASSUMED_EFFICIENCY)


def attention_efficiency(accelerator: Accelerator) -> float:
    """Share of the peak that fused attention reaches on a device."""
    return ATTENTION_EFFICIENCY[_family(accelerator) or "H100"]


def _family(accelerator: Accelerator) -> str | None:
    return next((like for name, like in LIKE.items() if accelerator.name.startswith(name)), None)
