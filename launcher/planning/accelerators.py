"""Peak arithmetic of accelerators, and the arithmetic of a model, for model FLOP/s utilisation (MFU)."""

import re
from dataclasses import dataclass
from typing import Literal

from launcher.planning.model_shape import ModelShape

Precision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Accelerator:
    """Peak rates of one device, dense (without structured sparsity), in FLOP/s.

    Attributes:
        pattern: regular expression of the whole name that torch reports.
        half: bf16 and fp16 with fp32 accumulation.
        single: fp32 without TF32, which torch does not use unless told to.
    """

    pattern: str
    half: float
    single: float


ACCELERATORS = (
    # NVIDIA A100 Tensor Core GPU data sheet (2021): 312 (624 with sparsity), 19.5; the same for SXM and PCIe.
    Accelerator(r"(NVIDIA )?A100(-SXM4-(40|80)GB|-PCIE-(40|80)GB| 80GB PCIe)", 312e12, 19.5e12),
    # NVIDIA H100 Tensor Core GPU data sheet, SXM: 1,979 with sparsity; architecture white paper: 989.4 dense, 66.9.
    Accelerator(r"NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
    # The same, PCIe: 1,513 with sparsity; white paper: 756 dense, 51.2.
    Accelerator(r"NVIDIA H100 PCIe", 756e12, 51.2e12),
    # The same, NVL: 1,671 with sparsity, 60.
    Accelerator(r"NVIDIA H100 NVL", 835.5e12, 60e12),
    # NVIDIA H200 data sheet, SXM: 1,979 with sparsity, 67; the chip is that of H100 SXM.
    Accelerator(r"NVIDIA H200", 989.4e12, 66.9e12),
    # The same, NVL: 1,671 with sparsity, 60.
    Accelerator(r"NVIDIA H200 NVL", 835.5e12, 60e12),
    # NVIDIA HGX B200 data sheet, eight GPUs: 36 PFLOP/s with sparsity (2.25 dense each), 600 TFLOP/s fp32.
    Accelerator(r"NVIDIA B200", 2250e12, 75e12),
    # NVIDIA L40S data sheet: 362.05 dense (733 with sparsity), 91.6.
    Accelerator(r"NVIDIA L40S", 362.05e12, 91.6e12),
    # NVIDIA Ada GPU architecture white paper, appendix A: 165.2 dense with fp32 accumulation, 82.6.
    Accelerator(r"NVIDIA GeForce RTX 4090", 165.2e12, 82.6e12),
    # AMD Instinct MI300X data sheet: 1,307.4 dense, 163.4.
    Accelerator(r"AMD Instinct MI300X( OAM)?", 1307.4e12, 163.4e12),
)


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Peak FLOP/s of one device in a precision.

    Args:
        device_name: as `torch.cuda.get_device_name` says it.
        precision: of the matrix products.

    Returns:
        `None` for a device whose data sheet is not in the table: no MFU is better than a wrong one.
    """
    for accelerator in ACCELERATORS:
        if re.fullmatch(accelerator.pattern, device_name):
            return accelerator.single if precision == "fp32" else accelerator.half
    return None


def model_flops_per_token(shape: ModelShape, sequence_length: int) -> int:
    """FLOPs that forward and backward of one token take, whatever is recomputed: `6 N + 12 L H Q T`.

    PaLM (Chowdhery et al., arXiv 2204.02311, appendix B), as also in nanoGPT: N parameters, L layers, H heads of width
    Q, T tokens of sequence. N counts the matrices that a token is multiplied with: no embedding look-ups, but the
    output head (tied or not), and of a mixture of experts only those chosen. The attention term is that of full
    attention; causal masking and sliding windows are not taken off, as in PaLM.
    """
    matrices = shape.num_active_parameters_non_embedding + shape.vocab_size * shape.hidden_size
    attention = shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * sequence_length
    return 6 * matrices + 12 * attention
