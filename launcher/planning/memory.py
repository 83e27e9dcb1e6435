"""Bytes per rank of the model states under ZeRO 0-3."""

from pydantic import BaseModel, ConfigDict


class MemoryPlan(BaseModel):
    """Bytes on the fullest rank (all ranks are alike under ZeRO up to rounding).

    Attributes:
        parameters: the weights that forward and backward use.
        gradients: as kept between backward and step.
        optimizer: fp32 copy of the weights (16-bit training) and the optimizer's moments.
        host_optimizer: the part of the optimizer states that is offloaded to host memory.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    parameters: int
    gradients: int
    optimizer: int
    host_parameters: int = 0
    host_optimizer: int = 0
