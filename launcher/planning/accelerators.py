"""What accelerators and the links between them can do at best, each number with its source.

All rates are dense (without structured sparsity) and of one device; bandwidths are those of one direction. An
accelerator that is not here is described in a YAML file (`AcceleratorFile`); there is no guess for an unknown one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.strict_yaml import read_yaml
from cluster.validation import near_match, validate
from launcher.errors import PlanError, Problem
from launcher.planning.model_shape import ModelShape

Precision = Literal["fp32", "bf16", "fp16"]
Format = Literal["fp32", "bf16", "fp16", "fp8"]

_MIB = 1 << 20
_GIB = 1 << 30
_GBIT = 1e9 / 8


@dataclass(frozen=True)
class Link:
    """What connects two devices.

    Attributes:
        name: for people.
        bandwidth: bytes per second that one device sends, and receives at the same time.
        latency: seconds that one step of a ring takes whatever it carries.
        source: where the numbers stand.
    """

    name: str
    bandwidth: float
    latency: float
    source: str


# Seconds a step of NCCL's ring, protocol Simple (what it uses for megabytes): NVLink 3.4, PCIe 5.7, network 14.0
# microseconds (NCCL 2.19 src/graph/tuning.cc, hwLat). RCCL's for Infinity Fabric: 3.6 (src/graph/tuning.cc).
_NVLINK_STEP, _PCIE_STEP, _NETWORK_STEP, _INFINITY_STEP = 3.4e-6, 5.7e-6, 14.0e-6, 3.6e-6
_TCP_STEP = 50e-6
"""A round over kernel TCP between two hosts of one rack, as `ping` shows it."""

NVLINK_3 = Link("NVLink 3", 300e9, _NVLINK_STEP, "NVIDIA A100 data sheet: 600 GB/s in both directions together")
NVLINK_4 = Link("NVLink 4", 450e9, _NVLINK_STEP, "NVIDIA H100 data sheet: 900 GB/s in both directions together")
NVLINK_5 = Link("NVLink 5", 900e9, _NVLINK_STEP, "NVIDIA HGX B200 data sheet: 1.8 TB/s in both directions together")
INFINITY_FABRIC = Link(
    "Infinity Fabric", 448e9, _INFINITY_STEP, "AMD MI300X data sheet: 7 links to peers, 128 GB/s both directions each"
)
PCIE_4 = Link("PCIe 4.0 x16", 31.5e9, _PCIE_STEP, "PCI-SIG: 16 GT/s x 16 lanes, 128b/130b")
PCIE_5 = Link("PCIe 5.0 x16", 63e9, _PCIE_STEP, "PCI-SIG: 32 GT/s x 16 lanes, 128b/130b")
SHARED_MEMORY = Link("shared memory", 4.8e9, 1e-6, "the share of one core in the memory bandwidth of its socket")


def _network(name: str, gigabits: float, latency: float, source: str) -> Link:
    return Link(name, gigabits * _GBIT, latency, source)


NETWORKS: dict[str, Link] = {
    link.name: link
    for link in (
        _network("NDR-400", 400, _NETWORK_STEP, "NVIDIA DGX H100 user guide: one 400 Gb/s ConnectX-7 port a GPU"),
        _network("HDR-200", 200, _NETWORK_STEP, "NVIDIA DGX A100 user guide: one 200 Gb/s ConnectX-6 port a GPU"),
        _network("EDR-100", 100, _NETWORK_STEP, "InfiniBand Trade Association roadmap: EDR 4x, one port a GPU"),
        _network("EFA-400", 400, _NETWORK_STEP, "AWS p5.48xlarge: 3,200 Gb/s for 8 GPUs"),
        _network("EFA-50", 50, _NETWORK_STEP, "AWS p4d.24xlarge: 400 Gb/s for 8 GPUs"),
        _network("Ethernet-100", 100, _TCP_STEP, "IEEE 802.3ba, one port a device"),
        _network("Ethernet-25", 25, _TCP_STEP, "IEEE 802.3by, one port a device"),
        _network("Ethernet-10", 10, _TCP_STEP, "IEEE 802.3ae, one port a device"),
    )
}
"""Links between nodes, as much as each device has of them."""


@dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    Attributes:
        name: as the command line takes it.
        pattern: regular expression of the whole name that torch reports.
        memory: bytes that the driver shows as total.
        peak: FLOP/s of matrix products by number format, 16 bit and fp8 accumulated in fp32, fp32 without TF32 (which
            torch does not use unless told to). A format that the hardware does not have is left out.
        memory_bandwidth: bytes per second.
        intra_node: link to the other devices of a node.
        inter_node: link to other nodes, as it is usually sold with this device.
        host: link to host memory.
        sources: where memory, peak and memory_bandwidth stand.
    """

    name: str
    pattern: str
    memory: int
    peak: Mapping[Format, float]
    memory_bandwidth: float
    intra_node: Link
    inter_node: Link
    host: Link
    sources: Mapping[str, str]


def _gpu(
    name: str,
    pattern: str,
    memory_mib: int,
    half: float,
    single: float,
    fp8: float | None,
    bandwidth: float,
    links: tuple[Link, Link, Link],
    sources: tuple[str, str, str],
) -> Accelerator:
    peak: dict[Format, float] = {"fp32": single * 1e12, "bf16": half * 1e12, "fp16": half * 1e12}
    if fp8 is not None:
        peak["fp8"] = fp8 * 1e12
    named = dict(zip(("memory", "peak", "memory_bandwidth"), sources, strict=True))
    return Accelerator(name, pattern, memory_mib * _MIB, peak, bandwidth * 1e9, *links, sources=named)


_SMI = "total that nvidia-smi shows"
_A100 = "NVIDIA A100 data sheet (2021): 312 (624 with sparsity), 19.5; the same for SXM and PCIe"
_H100 = "NVIDIA H100 data sheet: 1,979 (fp8 3,958) with sparsity; architecture white paper: 989.4 dense, 66.9"
_H100_PCIE = "NVIDIA H100 data sheet: 1,513 (fp8 3,026) with sparsity; architecture white paper: 756 dense, 51.2"
_H100_NVL = "NVIDIA H100 data sheet: 1,671 (fp8 3,341) with sparsity, 60"
_H200 = "NVIDIA H200 data sheet: 1,979 (fp8 3,958) with sparsity, 67; the chip is that of H100 SXM"
_H200_NVL = "NVIDIA H200 data sheet: 1,671 (fp8 3,341) with sparsity, 60"
_B200 = "NVIDIA HGX B200 data sheet, eight GPUs: 36 PFLOP/s (fp8 72) with sparsity, 600 TFLOP/s fp32"
_L40S = "NVIDIA L40S data sheet: 362.05 (fp8 733) dense, 91.6"
_ADA = "NVIDIA Ada GPU architecture white paper, appendix A: 165.2 (fp8 330.3) dense with fp32 accumulation, 82.6"
_MI300X = "AMD Instinct MI300X data sheet: 1,307.4 (fp8 2,614.9) dense, 163.4"
_NVLINK_H = (NVLINK_4, NETWORKS["NDR-400"], PCIE_5)
_NVLINK_A = (NVLINK_3, NETWORKS["HDR-200"], PCIE_4)

ACCELERATORS: tuple[Accelerator, ...] = (
    _gpu(
        "A100-80GB", r"(NVIDIA )?A100(-SXM4-80GB|-PCIE-80GB| 80GB PCIe)", 81920, 312, 19.5, None, 2039, _NVLINK_A,
        (_SMI, _A100, "NVIDIA A100 data sheet, SXM 80 GB"),
    ),
    _gpu(
        "A100-40GB", r"(NVIDIA )?A100(-SXM4-40GB|-PCIE-40GB)", 40960, 312, 19.5, None, 1555, _NVLINK_A,
        (_SMI, _A100, "NVIDIA A100 data sheet, 40 GB"),
    ),
    _gpu(
        "H100-80GB", r"NVIDIA H100 80GB HBM3", 81559, 989.4, 66.9, 1978.9, 3350, _NVLINK_H,
        (_SMI, _H100, "NVIDIA H100 data sheet, SXM"),
    ),
    _gpu(
        "H100-PCIe", r"NVIDIA H100 PCIe", 81559, 756, 51.2, 1513, 2000, (PCIE_5, NETWORKS["HDR-200"], PCIE_5),
        (_SMI, _H100_PCIE, "NVIDIA H100 data sheet, PCIe; pairs with an NVLink bridge are not counted"),
    ),
    _gpu(
        "H100-NVL", r"NVIDIA H100 NVL", 95830, 835.5, 60, 1670.5, 3900, (PCIE_5, NETWORKS["HDR-200"], PCIE_5),
        (_SMI, _H100_NVL, "NVIDIA H100 data sheet, NVL; pairs with an NVLink bridge are not counted"),
    ),
    _gpu(
        "H200-141GB", r"NVIDIA H200", 143771, 989.4, 66.9, 1978.9, 4800, _NVLINK_H,
        (_SMI, _H200, "NVIDIA H200 data sheet, SXM"),
    ),
    _gpu(
        "H200-NVL", r"NVIDIA H200 NVL", 143771, 835.5, 60, 1670.5, 4800, (NVLINK_4, NETWORKS["NDR-400"], PCIE_5),
        (_SMI, _H200_NVL, "NVIDIA H200 data sheet, NVL; four-way NVLink bridge"),
    ),
    _gpu(
        "B200-180GB", r"NVIDIA B200", 183359, 2250, 75, 4500, 8000, (NVLINK_5, NETWORKS["NDR-400"], PCIE_5),
        (_SMI, _B200, "NVIDIA DGX B200 data sheet: 64 TB/s for eight GPUs"),
    ),
    _gpu(
        "L40S-48GB", r"NVIDIA L40S", 46068, 362.05, 91.6, 733, 864, (PCIE_4, NETWORKS["Ethernet-100"], PCIE_4),
        (_SMI, _L40S, "NVIDIA L40S data sheet"),
    ),
    _gpu(
        "RTX4090-24GB", r"NVIDIA GeForce RTX 4090", 24564, 165.2, 82.6, 330.3, 1008,
        (PCIE_4, NETWORKS["Ethernet-25"], PCIE_4),
        (_SMI, _ADA, "NVIDIA Ada GPU architecture white paper, appendix A"),
    ),
    _gpu(
        "MI300X-192GB", r"AMD Instinct MI300X( OAM)?", 196288, 1307.4, 163.4, 2614.9, 5300,
        (INFINITY_FABRIC, NETWORKS["NDR-400"], PCIE_5),
        ("total that rocm-smi shows", _MI300X, "AMD Instinct MI300X data sheet"),
    ),
    Accelerator(
        name="CPU",
        pattern=r"cpu",
        memory=4 * _GIB,
        peak={"fp32": 118e9, "bf16": 236e9},
        memory_bandwidth=4.8e9,
        intra_node=SHARED_MEMORY,
        inter_node=NETWORKS["Ethernet-10"],
        host=SHARED_MEMORY,
        sources={
            "memory": "AWS m7a: 4 GiB a core",
            "peak": "one Zen 4 core at 3.7 GHz: two 256-bit fused multiply-adds a cycle in fp32, twice that with "
            "VDPBF16PS (AMD, Software Optimization Guide for the AMD Zen4)",
            "memory_bandwidth": "AMD EPYC 9004 data sheet: 460.8 GB/s a socket, shared by 96 cores",
        },
    ),
)  # fmt: skip
"""One row a device; what a row says is checked for completeness by the tests."""


class AcceleratorFile(BaseModel):
    """A YAML file that describes an accelerator of your own, for `zerofleet plan --gpu FILE.yaml`.

    Rates are dense, bandwidths those of one device in one direction.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """For people."""
    memory_gib: float = Field(gt=0)
    """Memory of one device, in GiB."""
    fp32_tflops: float = Field(gt=0)
    """Peak in fp32, in TFLOP/s."""
    bf16_tflops: float | None = Field(default=None, gt=0)
    """Peak in bf16; leave it out where the hardware has none."""
    fp16_tflops: float | None = Field(default=None, gt=0)
    """Peak in fp16; leave it out where the hardware has none."""
    fp8_tflops: float | None = Field(default=None, gt=0)
    """Peak in fp8; leave it out where the hardware has none."""
    memory_gb_per_second: float = Field(gt=0)
    """Bandwidth of the device's memory, in GB/s."""
    intra_node_gb_per_second: float = Field(gt=0)
    """From one device to the others of its node, in GB/s."""
    inter_node_gbit_per_second: float = Field(gt=0)
    """From one device to other nodes, in Gbit/s."""
    host_gb_per_second: float = Field(gt=0)
    """From one device to host memory, in GB/s."""
    intra_node_latency_microseconds: float = Field(default=5.7, gt=0)
    """Of one ring step inside a node; default: NCCL's for PCIe."""
    inter_node_latency_microseconds: float = Field(default=14.0, gt=0)
    """Of one ring step between nodes; default: NCCL's for InfiniBand."""

    def accelerator(self, source: str) -> Accelerator:
        """The same in the planner's units."""
        formats: dict[Format, float | None] = {
            "fp32": self.fp32_tflops, "bf16": self.bf16_tflops, "fp16": self.fp16_tflops, "fp8": self.fp8_tflops,
        }  # fmt: skip
        inside = Link(
            "intra-node", self.intra_node_gb_per_second * 1e9, self.intra_node_latency_microseconds * 1e-6, source
        )
        outside = _network(
            "inter-node", self.inter_node_gbit_per_second, self.inter_node_latency_microseconds * 1e-6, source
        )
        return Accelerator(
            name=self.name,
            pattern=re.escape(self.name),
            memory=int(self.memory_gib * _GIB),
            peak={name: rate * 1e12 for name, rate in formats.items() if rate is not None},
            memory_bandwidth=self.memory_gb_per_second * 1e9,
            intra_node=inside,
            inter_node=outside,
            host=Link("host", self.host_gb_per_second * 1e9, _PCIE_STEP, source),
            sources=dict.fromkeys(("memory", "peak", "memory_bandwidth"), source),
        )


def find_accelerator(name: str) -> Accelerator:
    """Look up a device by its name in the catalogue, by torch's name for it, or read the YAML file that describes it.

    Raises:
        PlanError: the catalogue has no such device; the text says how to describe one. Or the file is wrong.
    """
    for accelerator in ACCELERATORS:
        if name.lower() == accelerator.name.lower() or re.fullmatch(accelerator.pattern, name):
            return accelerator
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return validate(AcceleratorFile, read_yaml(path, PlanError), PlanError).accelerator(str(path))
    known = [accelerator.name for accelerator in ACCELERATORS]
    near = near_match(name, known)
    fields = ", ".join(field for field, info in AcceleratorFile.model_fields.items() if info.is_required())
    raise PlanError(
        "--gpu",
        [
            Problem(
                f"{name} is not in the catalogue{f'; {near}' if near else ''} (known: {', '.join(known)}). For another "
                f"device, write its numbers to a YAML file ({fields}; bf16_tflops and fp16_tflops where it has them) "
                "and give the file's name"
            )
        ],
    )


def find_network(name: str) -> Link:
    """Look up a link between nodes by name, or take a number of Gbit/s a device, such as `400`.

    Raises:
        PlanError: it is neither.
    """
    for known, link in NETWORKS.items():
        if name.lower() == known.lower():
            return link
    number = re.fullmatch(r"(\d+(?:\.\d+)?)(?:\s*gbit(?:/s)?)?", name.lower())
    if number is None or float(number[1]) <= 0:
        message = (
            f"{name} is no network of the catalogue; known: {', '.join(NETWORKS)}. For another one, give the Gbit/s "
            "that each device has, such as 200"
        )
        raise PlanError("--network", [Problem(message)])
    return _network(f"{number[1]} Gbit/s", float(number[1]), _NETWORK_STEP, "given")


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Peak FLOP/s of one device in a precision.

    Args:
        device_name: as `torch.cuda.get_device_name` says it.
        precision: of the matrix products.

    Returns:
        `None` for a device whose data sheet is not in the table, and for a CPU, whose name does not say which one it
        is: no MFU is better than a wrong one.
    """
    for accelerator in ACCELERATORS:
        if accelerator.name != "CPU" and re.fullmatch(accelerator.pattern, device_name):
            return accelerator.peak.get(precision)
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
