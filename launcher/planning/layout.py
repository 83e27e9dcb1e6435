"""Sizes of the parallel groups and the batch arithmetic that follows from them."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Resources(BaseModel):
    """What a profile gives to a run, in numbers.

    Attributes:
        nodes: machines.
        workers_per_node: training processes on each.
        device: what a worker computes on; one GPU a worker for `cuda`.
        cpus_per_worker: CPUs that Ray reserves for each.
        environment_names: variables that the driver passes on to the workers; their values stay out of every file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: int = 1
    workers_per_node: int = 1
    device: Literal["cpu", "cuda"] = "cpu"
    cpus_per_worker: float = 1.0
    environment_names: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return self.nodes * self.workers_per_node


class Layout(BaseModel):
    """Sizes of the parallel groups; their product is the world size (expert groups lie inside data parallel)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_size: int
    data_parallel_size: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    sequence_parallel_size: int = 1
    expert_parallel_size: int = 1


class BatchPlan(BaseModel):
    """`global_batch_size = micro_batch_size x gradient_accumulation_steps x data_parallel_size`, in samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int
