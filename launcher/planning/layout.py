"""Sizes of the parallel groups and the batch arithmetic that follows from them."""

from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from launcher.errors import PlanError, Problem
from launcher.recipe.schema import Recipe

Axis = Literal["pipeline", "data", "sequence", "tensor"]
AXES: tuple[Axis, ...] = ("pipeline", "data", "sequence", "tensor")
"""From the slowest to the fastest in the order of ranks, as DeepSpeed numbers them: `PipeModelDataParallelTopology`
(`runtime/pipe/topology.py`) for pipeline, data and model (tensor), `_init_tp_mesh_device` (`utils/groups.py`) for data
and tensor, `initialize_sequence_parallel` (`runtime/sequence_parallel/parallel_state_sp.py`) for data and sequence.
Ranks go node by node, so the groups that talk most, tensor and then sequence, lie inside a node whenever their size
divides the workers of a node."""


class Coordinates(NamedTuple):
    """Where a rank stands in each of its groups."""

    pipeline: int
    data: int
    sequence: int
    tensor: int


class Resources(BaseModel):
    """What a profile gives to a run, in numbers.

    Attributes:
        nodes: machines.
        workers_per_node: training processes on each.
        device: what a worker computes on; one GPU a worker for `cuda`.
        cpus_per_worker: CPUs that Ray reserves for each.
        environment_names: variables that the driver passes on to the workers; their values stay out of every file.
        min_nodes: fewest machines to go on with when others are lost; None: all are needed.
        accelerator: what a worker computes on, by a name of the catalogue or the file that describes it; `None` when it
            is not known, and then neither time nor what fits is estimated.
        network: between nodes, by a name of the catalogue; `None` for the one that is usual with the accelerator.
        host_memory: bytes of each node; `None` when it is not known.
        memory_per_worker: bytes that Ray reserves for each worker; `None` for none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    nodes: int = Field(default=1, ge=1)
    workers_per_node: int = Field(default=1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    cpus_per_worker: float = Field(default=1.0, ge=0)
    environment_names: tuple[str, ...] = ()
    min_nodes: int | None = None
    accelerator: str | None = None
    network: str | None = None
    host_memory: int | None = Field(default=None, gt=0)
    memory_per_worker: int | None = Field(default=None, gt=0)

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return self.nodes * self.workers_per_node

    def resized(self, world_size: int) -> "Resources":
        """The same kind of workers in another number, as many to a node as divide it."""
        per_node = max(size for size in divisors(world_size) if size <= self.workers_per_node)
        return self.model_copy(update={"nodes": world_size // per_node, "workers_per_node": per_node})


class Layout(BaseModel):
    """Sizes of the parallel groups; their product is the world size (expert groups lie inside data parallel)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    world_size: int
    data_parallel_size: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    sequence_parallel_size: int = 1
    expert_parallel_size: int = 1

    @property
    def model_parallel_size(self) -> int:
        """Workers that hold one copy of the model between them."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.sequence_parallel_size

    def size(self, axis: Axis) -> int:
        """Ranks in each group along an axis."""
        size: int = getattr(self, f"{axis}_parallel_size")
        return size

    def coordinates(self, rank: int) -> Coordinates:
        """Find a rank's place in each of its groups."""
        places = []
        for axis in reversed(AXES):
            rank, place = divmod(rank, self.size(axis))
            places.append(place)
        return Coordinates(*reversed(places))

    def rank(self, coordinates: Coordinates) -> int:
        """The rank at a place: the inverse of `coordinates`."""
        rank = 0
        for axis, place in zip(AXES, coordinates, strict=True):
            rank = rank * self.size(axis) + place
        return rank

    def groups(self, axis: Axis) -> list[list[int]]:
        """Every group along an axis, as ascending ranks."""
        groups: dict[Coordinates, list[int]] = {}
        for rank in range(self.world_size):
            groups.setdefault(self.coordinates(rank)._replace(**{axis: 0}), []).append(rank)
        return list(groups.values())

    @model_validator(mode="after")
    def _sizes_multiply(self) -> Self:
        if self.model_parallel_size * self.data_parallel_size != self.world_size:
            raise ValueError(f"the sizes of {self!r} do not multiply to its world size")
        return self


class BatchPlan(BaseModel):
    """`global_batch_size = micro_batch_size x gradient_accumulation_steps x data_parallel_size`, in samples."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    micro_batch_size: int
    gradient_accumulation_steps: int
    global_batch_size: int


def make_layout(recipe: Recipe, resources: Resources) -> Layout:
    """Divide the workers among the recipe's parallel groups; what is left of the world size is data parallel.

    Raises:
        PlanError: the sizes do not multiply to the world size; lists those that do.
    """
    sizes = recipe.parallel.sizes
    world_size = resources.world_size
    per_model = sizes["tensor_parallel_size"] * sizes["pipeline_parallel_size"] * sizes["sequence_parallel_size"]
    if world_size % per_model:
        factors = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 and "expert" not in name)
        raise PlanError(
            recipe.name,
            [
                Problem(
                    f"{factors} = {per_model} does not divide the world size {world_size}; "
                    f"make the product one of {_listed(divisors(world_size))}",
                    where="parallel",
                )
            ],
        )
    layout = Layout(world_size=world_size, data_parallel_size=world_size // per_model, **sizes)
    if layout.data_parallel_size % layout.expert_parallel_size:
        fits = _listed(divisors(layout.data_parallel_size))
        message = (
            f"{layout.expert_parallel_size} does not divide the data-parallel size {layout.data_parallel_size}, inside "
            f"which expert groups lie; set it to one of {fits}"
        )
        raise PlanError(recipe.name, [Problem(message, where="parallel.expert_parallel_size")])
    return layout


def make_batch(recipe: Recipe, layout: Layout) -> BatchPlan:
    """Complete the batch arithmetic: any two of micro, accumulation and global give the third.

    With only one of them, a missing accumulation counts as 1 (as in DeepSpeed); the accumulation alone says nothing
    about the batch and is refused, as is none of the three.

    Raises:
        PlanError: the sizes contradict each other or the data-parallel size, or too few are given.
    """
    training = recipe.training
    micro, accumulation, total = (
        training.micro_batch_size,
        training.gradient_accumulation_steps,
        training.global_batch_size,
    )
    replicas = layout.data_parallel_size
    if micro is not None and total is None:
        accumulation = accumulation or 1
        total = micro * accumulation * replicas
    elif total is not None and micro is not None:
        accumulation = (
            _quotient(recipe, total, micro, "micro_batch_size", replicas) if accumulation is None else accumulation
        )
    elif total is not None:
        accumulation = accumulation or 1
        micro = _quotient(recipe, total, accumulation, "gradient_accumulation_steps", replicas)
    if micro is None or accumulation is None or total is None:
        given = f"only gradient_accumulation_steps ({accumulation}) is set" if accumulation else "no batch size is set"
        raise _batch_error(recipe, f"{given}; set micro_batch_size or global_batch_size")
    if micro * accumulation * replicas != total:
        raise _batch_error(recipe, _contradiction(micro, accumulation, replicas, total))
    return BatchPlan(micro_batch_size=micro, gradient_accumulation_steps=accumulation, global_batch_size=total)


def resize_batch(batch: BatchPlan, data_parallel_size: int) -> BatchPlan | None:
    """Keep the global batch at another data-parallel size: the largest micro batch that is not larger than before.

    Returns:
        `None` when the data-parallel size does not divide the global batch.
    """
    samples, rest = divmod(batch.global_batch_size, data_parallel_size)
    if rest:
        return None
    micro = max(size for size in divisors(samples) if size <= batch.micro_batch_size)
    return batch.model_copy(update={"micro_batch_size": micro, "gradient_accumulation_steps": samples // micro})


def divisors(number: int) -> list[int]:
    """All divisors of a positive number, ascending."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return small + [number // size for size in reversed(small) if size * size != number]


def _quotient(recipe: Recipe, total: int, known: int, known_name: str, replicas: int) -> int:
    """`total / (known x replicas)`, or the error that says what would divide."""
    if total % (known * replicas) == 0:
        return total // (known * replicas)
    product = known * replicas
    below, above = total // product * product, -(-total // product) * product
    works = f"{below} or {above}" if below else str(above)
    advice = f"set global_batch_size to {works}"
    if total % replicas == 0:
        advice += f", or {known_name} to a divisor of {total // replicas}: {_listed(divisors(total // replicas))}"
    else:
        advice += f", or use a number of data-parallel workers that divides {total}: {_listed(divisors(total))}"
    raise _batch_error(
        recipe,
        f"{total} is not a multiple of {known_name} {known} x data-parallel size {replicas} = {product}; {advice}",
    )


def _contradiction(micro: int, accumulation: int, replicas: int, total: int) -> str:
    advice = f"set global_batch_size to {micro * accumulation * replicas}"
    if total % (micro * replicas) == 0:
        advice += f", or gradient_accumulation_steps to {total // (micro * replicas)}"
    if total % (accumulation * replicas) == 0:
        advice += f", or micro_batch_size to {total // (accumulation * replicas)}"
    return (
        f"{total} contradicts micro_batch_size {micro} x gradient_accumulation_steps {accumulation} x "
        f"data-parallel size {replicas} = {micro * accumulation * replicas}; {advice}, or leave one of the three out"
    )


def _batch_error(recipe: Recipe, message: str) -> PlanError:
    return PlanError(recipe.name, [Problem(message, where="training.global_batch_size")])


def _listed(sizes: list[int]) -> str:
    return ", ".join(str(size) for size in sizes)
