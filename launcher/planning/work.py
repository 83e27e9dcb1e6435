"""What an optimizer step does, what it runs on, and its time by what that is spent on."""

from dataclasses import dataclass
from functools import cached_property

from launcher.planning.accelerators import Accelerator, Format, Link
from launcher.planning.calibration import OURS, Software
from launcher.planning.collectives import Fabric
from launcher.planning.layout import Layout
from launcher.planning.model_shape import ModelShape


@dataclass(frozen=True)
class Work:
    """One optimizer step, as far as its time depends on it.

    Attributes:
        shape: of the model.
        gated: the MLP has a gate, and so three matrices.
        layout: sizes of the groups.
        micro_batches: that each data-parallel replica does in a step.
        recomputation: share of the forward pass that the backward pass does again.
        virtual_stages: parts of each pipeline stage that are interleaved (arXiv 2104.04473, section 2.2.2).
        number_format: of the matrix products.
        reduces_every_micro_batch: gradients are divided as soon as they are there (ZeRO 2 and 3 under DeepSpeed).
        offload_optimizer: optimizer states live in host memory.
        offload_param: parameters too.
    """

    shape: ModelShape
    gated: bool
    layout: Layout
    sequence_length: int
    micro_batch_size: int
    micro_batches: int
    zero_stage: int
    number_format: Format
    recomputation: float = 0.0
    virtual_stages: int = 1
    reduces_every_micro_batch: bool = True
    offload_optimizer: bool = False
    offload_param: bool = False

    @property
    def tokens(self) -> int:
        """Of a rank's part of a micro batch."""
        return self.micro_batch_size * self.sequence_length // self.layout.sequence_parallel_size

    @property
    def tokens_in_step(self) -> int:
        """Of all ranks together."""
        batches = self.micro_batches * self.layout.data_parallel_size
        return self.micro_batch_size * self.sequence_length * batches


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on the slowest rank, by what they are spent on; overlapped communication is not counted.

    Attributes:
        matrices: matrix products of the layers.
        attention: scores and what they weight.
        elementwise: norms, activations, residuals, rotary positions.
        head: logits and loss.
        tensor: communication inside layers: of tensor, sequence and expert groups.
        pipeline: waiting for other stages.
        data: gradients and parameters of the data-parallel group.
        optimizer: the update itself.
        offload: between device and host, and the update there.
        tokens: of the step, on all devices.
        devices: number of them.
        flops: of the model for these tokens, as MFU counts them.
        peak: FLOP/s of one device.
    """

    matrices: float
    attention: float
    elementwise: float
    head: float
    tensor: float
    pipeline: float
    data: float
    optimizer: float
    offload: float
    tokens: int
    devices: int
    flops: float
    peak: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    @property
    def tokens_per_second_per_device(self) -> float:
        """Throughput of one device."""
        return self.tokens / self.seconds / self.devices

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation (arXiv 2204.02311, appendix B)."""
        return self.flops / self.seconds / self.devices / self.peak

    def parts(self) -> dict[str, float]:
        """Seconds by what they are spent on."""
        names = (
            *("matrices", "attention", "elementwise", "head", "tensor"),
            *("pipeline", "data", "optimizer", "offload"),
        )
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Machine:
    """Devices and links.

    Attributes:
        accelerator: one device.
        network: between nodes; the device's usual one if `None`.
        workers_per_node: devices in each node.
        software: how well they are used.
    """

    accelerator: Accelerator
    workers_per_node: int = 8
    network: Link | None = None
    software: Software = OURS

    @cached_property
    def fabric(self) -> Fabric:
        """The links."""
        return Fabric(self.accelerator.intra_node, self.network or self.accelerator.inter_node, self.workers_per_node)
