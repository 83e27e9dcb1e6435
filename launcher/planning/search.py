"""Every legal layout of a recipe on given machines: pruned by memory, ranked by the time of a step.

Legal is what `combinations.COMBINATIONS` has a row for, and what the model's sizes divide into. What a recipe sets of
ZeRO and recomputation stays; groups, micro batch and accumulation are searched, the global batch is kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import prod
from typing import Any

from launcher.errors import PlanError, Problem
from launcher.planning.activations import ActivationModel, ActivationSettings
from launcher.planning.combinations import COMBINATIONS, Combination, model_problems
from launcher.planning.compiling import compile_problems
from launcher.planning.deepspeed_config import DeepSpeedPlan, make_deepspeed_config
from launcher.planning.estimate import (
    activation_settings,
    buffer_settings,
    machine_of,
    rank_states,
    step_work,
    vocabulary_parallel,
)
from launcher.planning.families import list_parameters
from launcher.planning.fit import HOST_USABLE, device_memory, with_checkpointing
from launcher.planning.kept_states import kept_bytes
from launcher.planning.layout import BatchPlan, Layout, Resources, divisors, make_batch, make_layout
from launcher.planning.memory import MemoryPlan, uncounted_reason
from launcher.planning.model_shape import ModelShape, model_shape
from launcher.planning.optimizers import optimizer_problems
from launcher.planning.rank_memory import RankMemory, activations_known, stage_memory, stage_states
from launcher.planning.sharding import StageParameters, shard
from launcher.planning.throughput import Machine, StepTime, step_time
from launcher.planning.tiling import tiling_problems
from launcher.recipe.layout_sections import ParallelSection
from launcher.recipe.schema import Recipe

LARGEST_MICRO_BATCH = 64
"""Samples; larger ones gain nothing, since matrix products are large by then."""
_OFFLOADS = (("none", "none"), ("cpu", "none"), ("cpu", "cpu"))
"""(offload_optimizer, offload_param)."""


@dataclass(frozen=True)
class Choice:
    """One way to run a recipe.

    Attributes:
        layout: sizes of the groups.
        zero_stage: 0 to 3.
        offload_optimizer: `none` or `cpu`.
        offload_param: `none` or `cpu`.
        batch: micro batch and accumulation; the global batch is the recipe's.
        gradient_checkpointing: activations are recomputed.
    """

    layout: Layout
    zero_stage: int
    offload_optimizer: str
    offload_param: str
    batch: BatchPlan
    gradient_checkpointing: bool

    def overrides(self) -> list[str]:
        """The same as overrides of the recipe."""
        sizes = {name: getattr(self.layout, name) for name in ParallelSection().sizes}
        values = {f"parallel.{name}": size for name, size in sizes.items()} | {
            "zero.stage": self.zero_stage,
            "zero.offload_optimizer": self.offload_optimizer,
            "zero.offload_param": self.offload_param,
            "training.micro_batch_size": self.batch.micro_batch_size,
            "training.gradient_accumulation_steps": self.batch.gradient_accumulation_steps,
            "training.global_batch_size": self.batch.global_batch_size,
            "training.gradient_checkpointing": str(self.gradient_checkpointing).lower(),
        }
        return [f"{name}={value}" for name, value in values.items()]

    def applied(self, recipe: Recipe) -> Recipe:
        """The recipe with these values."""
        sizes = {name: getattr(self.layout, name) for name in ParallelSection().sizes}
        zero = {
            "stage": self.zero_stage, "offload_optimizer": self.offload_optimizer, "offload_param": self.offload_param
        }  # fmt: skip
        update = {
            "parallel": recipe.parallel.model_copy(update={**sizes, "auto": False}),
            "zero": recipe.zero.model_copy(update=zero),
            "training": recipe.training.model_copy(update=self.batch.model_dump()),
        }
        return with_checkpointing(recipe.model_copy(update=update), self.gradient_checkpointing)


@dataclass(frozen=True)
class Judged:
    """A choice, what it needs and how long a step takes.

    Attributes:
        choice: the choice.
        rank: memory of the fullest rank.
        host_bytes: of a node.
        step: time of a step.
        fits: into devices and hosts.
    """

    choice: Choice
    rank: RankMemory
    host_bytes: int
    step: StepTime
    fits: bool


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        best: those that fit, the fastest first.
        closest: of those that do not fit, the one that needs least memory; `None` when all fit.
        num_choices: how many were judged.
        memory: bytes that tensors can have on a device; `None` on CPU.
        host_memory: bytes of a node; `None` when it is not known.
    """

    best: tuple[Judged, ...]
    closest: Judged | None
    num_choices: int
    memory: int | None
    host_memory: int | None


def search(recipe: Recipe, config: Mapping[str, Any], shape: ModelShape, resources: Resources) -> SearchResult:
    """Judge every legal choice.

    Args:
        recipe: its global batch is kept; `parallel` may be `auto`.
        config: of transformers.
        shape: of the same.
        resources: with a known accelerator.

    Raises:
        PlanError: the accelerator is not known, the model's memory is not counted, or the recipe's batch is wrong.
    """
    if not activations_known(config):
        raise _error(recipe, f"the memory of {config.get('model_type')} is not counted, so no layout can be chosen")
    judge = _Judge(recipe, config, shape, resources)
    judged = [item for choice in choices(recipe, config, resources) if (item := judge.judge(choice)) is not None]
    if not judged and judge.refused is not None:
        raise judge.refused
    if not judged:
        raise _error(
            recipe,
            f"no layout of {resources.world_size} workers keeps the global batch of {judge.global_batch}; set "
            f"training.global_batch_size to a multiple of {resources.world_size}",
        )
    best = sorted((item for item in judged if item.fits), key=_rank)
    others = [item for item in judged if not item.fits]
    closest = min(others, key=lambda item: (item.rank.device_bytes, item.host_bytes), default=None)
    return SearchResult(tuple(best), closest, len(judged), judge.memory, resources.host_memory)


def _rank(item: Judged) -> tuple[float, bool, int, int]:
    """The fastest first; among those that are as fast to a thousandth, the simplest with the fewest passes."""
    choice = item.choice
    seconds = float(f"{item.step.seconds:.3g}")
    return (
        seconds,
        choice.offload_optimizer != "none",
        choice.layout.model_parallel_size,
        -choice.batch.micro_batch_size,
    )


def why_slower(item: Judged, best: Judged) -> str:
    """The part of the step that costs a choice most against the best one."""
    parts, least = item.step.parts(), best.step.parts()
    name = max(parts, key=lambda part: parts[part] - least[part])
    more = parts[name] - least[name]
    if more <= 0 or item.step.seconds <= best.step.seconds:
        return "as fast"
    return f"{item.step.seconds / best.step.seconds - 1:.1%} slower: {more:.3g} s more for {WORDS[name]}"


WORDS = {
    "matrices": "matrix products",
    "attention": "attention",
    "elementwise": "elementwise kernels",
    "head": "logits and loss",
    "tensor": "communication inside layers",
    "pipeline": "waiting for pipeline stages",
    "data": "gradients and parameters between replicas",
    "optimizer": "the optimizer",
    "offload": "the way to host memory and the update there",
}
"""Parts of a step, for people."""


def nothing_fits(result: SearchResult) -> str:
    """Say how far the closest choice is from fitting."""
    if result.closest is None:
        return "there is nothing to choose from"
    closest = result.closest
    needed, room, where = closest.rank.device_bytes, result.memory, "a device"
    if room is None or needed <= room:
        needed, room, where = closest.host_bytes, int((result.host_memory or 0) * HOST_USABLE), "a node's memory"
    return (
        f"none of {result.num_choices} layouts fits: the smallest ({' '.join(closest.choice.overrides())}) needs "
        f"{needed / 2**30:.1f} GiB of {where}, which has {room / 2**30:.1f} GiB for it; use more devices"
    )


def choices(recipe: Recipe, config: Mapping[str, Any], resources: Resources) -> Iterator[Choice]:
    """Enumerate every legal choice."""
    shape = model_shape(config)
    global_batch = _global_batch(recipe, resources)
    set_checkpointing = "gradient_checkpointing" in recipe.training.model_fields_set
    recomputations = (recipe.training.gradient_checkpointing,) if set_checkpointing else (False, True)
    for row in COMBINATIONS:
        if recipe.training.precision not in row.precisions:
            continue
        zeros = list(_zeros(recipe, row, resources.device))
        for layout in _layouts(row, resources.world_size):
            batches = _batches(global_batch, layout)
            if not batches or model_problems(config, layout, recipe, shape):
                continue
            legal = [zero for zero in zeros if _trains_under(recipe, config, layout, *zero)]
            for (stage, optimizer, param), batch, recomputes in product(legal, batches, recomputations):
                yield Choice(layout, stage, optimizer, param, batch, recomputes)


def _trains_under(
    recipe: Recipe, config: Mapping[str, Any], layout: Layout, stage: int, optimizer: str, param: str
) -> bool:
    """Whether the recipe's optimizer, its compiler and its parts of the sequence go with a stage and its offload."""
    offloads = (optimizer, param) != ("none", "none")
    problems = [*compile_problems(config, layout, stage, recipe), *tiling_problems(config, layout, recipe)]
    return not problems and not optimizer_problems(recipe, layout, stage, offloads)


def _layouts(row: Combination, world_size: int) -> Iterator[Layout]:
    kinds = [kind for kind in ("tensor", "pipeline", "sequence", "expert") if kind in row.groups]
    for sizes in product(*([size for size in divisors(world_size) if size > 1] for _ in kinds)):
        named = dict(zip(kinds, sizes, strict=True))
        per_model = prod(size for kind, size in named.items() if kind != "expert")
        if world_size % per_model:
            continue
        replicas = world_size // per_model
        if replicas % named.get("expert", 1) == 0:
            groups = {f"{kind}_parallel_size": size for kind, size in named.items()}
            yield Layout(world_size=world_size, data_parallel_size=replicas, **groups)


def _zeros(recipe: Recipe, row: Combination, device: str) -> Iterator[tuple[int, str, str]]:
    """Stages and offloads of a row, as far as the recipe leaves them open."""
    zero = recipe.zero
    for stage, (optimizer, param) in product(sorted(row.zero_stages), _OFFLOADS):
        wanted = (zero.stage, zero.offload_optimizer, zero.offload_param)
        if any(value not in (None, given) for value, given in zip(wanted, (stage, optimizer, param), strict=True)):
            continue
        if (optimizer != "none" and (stage == 0 or not row.offload)) or (param != "none" and stage != 3):
            continue
        if device == "cpu" and optimizer != "none" and zero.offload_optimizer is None:
            continue  # the host is the device
        yield stage, optimizer, param


def _batches(global_batch: int, layout: Layout) -> list[BatchPlan]:
    samples, rest = divmod(global_batch, layout.data_parallel_size)
    if rest:
        return []
    return [
        BatchPlan(micro_batch_size=micro, gradient_accumulation_steps=samples // micro, global_batch_size=global_batch)
        for micro in divisors(samples)
        if micro <= LARGEST_MICRO_BATCH
    ]


def _global_batch(recipe: Recipe, resources: Resources) -> int:
    """The recipe's, or the one that its micro batch gives on its own layout."""
    if recipe.training.global_batch_size is not None:
        return recipe.training.global_batch_size
    return make_batch(recipe, make_layout(recipe, resources)).global_batch_size  # `auto`: of data parallelism alone


class _Judge:
    """Estimates choices of one recipe; what several of them share is made once."""

    def __init__(self, recipe: Recipe, config: Mapping[str, Any], shape: ModelShape, resources: Resources) -> None:
        self.config = config
        self.shape = shape
        self.resources = resources
        self.memory = device_memory(resources)
        self.global_batch = _global_batch(recipe, resources)
        self.refused: PlanError | None = None
        self._recipes = {recomputes: with_checkpointing(recipe, recomputes) for recomputes in (False, True)}
        self._parameters = list_parameters(config)
        self._zero = cache(self._make_zero)
        self._stages = cache(self._make_stages)
        self._states = cache(self._make_states)
        self._activations = cache(self._make_activations)
        if machine_of(resources, {}) is None:
            raise _error(recipe, "the accelerator is not known; set it in the profile, or give --gpu NAME")

    def judge(self, choice: Choice) -> Judged | None:
        """Memory and time of one choice; `None` when the recipe's own DeepSpeed config does not go with it."""
        made = self._zero(choice.layout, choice.zero_stage, choice.offload_optimizer, choice.offload_param)
        if made is None:
            return None
        zero, machine = made
        ranks = self._ranks(choice, zero)
        fullest = max(ranks, key=lambda rank: rank.device_bytes)
        host = max(rank.host_bytes for rank in ranks) * self.resources.workers_per_node
        recipe = self._recipes[choice.gradient_checkpointing]
        host += kept_bytes(recipe, ranks, self.resources)
        fits = self.memory is None or fullest.device_bytes <= self.memory
        if self.resources.host_memory is not None:
            fits = fits and host <= self.resources.host_memory * HOST_USABLE
        work = step_work(recipe, self.config, self.shape, choice.layout, choice.batch, zero)
        return Judged(choice, fullest, host, step_time(work, machine), fits)

    def _ranks(self, choice: Choice, zero: DeepSpeedPlan) -> list[RankMemory]:
        layout, recipe = choice.layout, self._recipes[choice.gradient_checkpointing]
        settings = activation_settings(recipe, layout, choice.batch, zero.config, self.resources.device)
        model = self._activations(settings)
        steps = choice.batch.gradient_accumulation_steps
        offloads = (choice.offload_optimizer, choice.offload_param)
        held_states = self._states(layout, choice.zero_stage, *offloads, steps > 1)
        state_settings = replace(rank_states(recipe, layout, zero), gradient_accumulation_steps=steps)
        buffers = buffer_settings(zero.config)
        return [
            stage_memory(index, held, states, model, layout, state_settings, buffers)
            for index, held, states in held_states
        ]

    def _make_zero(
        self, layout: Layout, stage: int, optimizer: str, param: str
    ) -> tuple[DeepSpeedPlan, Machine] | None:
        """The DeepSpeed config, and the machine under it; batch sizes in it do not count."""
        batch = BatchPlan(
            micro_batch_size=1, gradient_accumulation_steps=1, global_batch_size=layout.data_parallel_size
        )
        recipe = Choice(layout, stage, optimizer, param, batch, False).applied(self._recipes[False])
        try:
            zero = make_deepspeed_config(recipe, layout, batch, self.config["model_type"])
        except PlanError as error:
            self.refused = self.refused or error
            return None
        if reason := uncounted_reason(zero.config):
            raise _error(recipe, f"memory is not counted, so no layout can be chosen: {reason}")
        machine = machine_of(self.resources, zero.config)
        if machine is None:
            raise AssertionError("the accelerator was known at the start")
        return zero, machine

    def _make_stages(self, layout: Layout, vocabulary: bool) -> list[StageParameters]:
        return shard(self._parameters, layout, vocabulary)

    def _make_states(
        self, layout: Layout, stage: int, optimizer: str, param: str, accumulates: bool
    ) -> list[tuple[int, StageParameters, MemoryPlan]]:
        """Pipeline stages with their parameters and states; of equal ones the first, which keeps most micro batches."""
        made = self._zero(layout, stage, optimizer, param)
        if made is None:
            return []
        zero, _ = made
        settings = replace(
            rank_states(self._recipes[False], layout, zero), gradient_accumulation_steps=2 if accumulates else 1
        )
        first_of_kind: dict[tuple[int, int, bool], tuple[int, StageParameters]] = {}
        for index, held in enumerate(self._stages(layout, vocabulary_parallel(zero.config))):
            first_of_kind.setdefault((held.num_parameters, held.num_layers, held.has_head), (index, held))
        return [
            (index, held, stage_states(held, settings, layout.expert_parallel_size))
            for index, held in first_of_kind.values()
        ]

    def _make_activations(self, settings: ActivationSettings) -> ActivationModel:
        return ActivationModel(self.config, settings)


def _error(recipe: Recipe, message: str) -> PlanError:
    return PlanError(recipe.name, [Problem(message, "parallel")])
