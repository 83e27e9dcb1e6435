"""Every legal layout of a recipe on given machines: pruned by memory, ranked by the time of a step."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from launcher.errors import PlanError, Problem
from launcher.planning.activations import ActivationModel, ActivationSettings
from launcher.planning.choices import Choice, choices, global_batch
from launcher.planning.deepspeed_config import DeepSpeedPlan, make_deepspeed_config
from launcher.planning.estimate import (
    activation_settings,
    buffer_settings,
    machine_of,
    rank_states,
    reference_bytes,
    step_work,
    vocabulary_parallel,
)
from launcher.planning.fit import HOST_USABLE, device_memory, with_checkpointing
from launcher.planning.kept_states import kept_bytes
from launcher.planning.layout import BatchPlan, Layout, Resources
from launcher.planning.memory import MemoryPlan, uncounted_reason
from launcher.planning.model_shape import ModelShape
from launcher.planning.rank_memory import RankMemory, activations_known, stage_memory, stage_states
from launcher.planning.sharding import StageParameters, shard
from launcher.planning.throughput import step_time
from launcher.planning.trained import parts_of
from launcher.planning.work import Machine, StepTime
from launcher.recipe.schema import Recipe


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


class _Judge:
    """Estimates choices of one recipe; what several of them share is made once."""

    def __init__(self, recipe: Recipe, config: Mapping[str, Any], shape: ModelShape, resources: Resources) -> None:
        self.config = config
        self.shape = shape
        self.resources = resources
        self.memory = device_memory(resources)
        self.global_batch = global_batch(recipe, resources)
        self.refused: PlanError | None = None
        self._recipes = {recomputes: with_checkpointing(recipe, recomputes) for recomputes in (False, True)}
        self._parts = parts_of(recipe, config)
        self._references = reference_bytes(self._parts, config, recipe)
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
        settings = activation_settings(
            recipe, self.config, self._parts, layout, choice.batch, zero.config, self.resources.device
        )
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
        return shard(self._parts.parameters, layout, vocabulary, self._parts.frozen)

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
            (index, held, stage_states(held, settings, layout.expert_parallel_size, self._references))
            for index, held in first_of_kind.values()
        ]

    def _make_activations(self, settings: ActivationSettings) -> ActivationModel:
        return ActivationModel(self.config, settings)


def _error(recipe: Recipe, message: str) -> PlanError:
    return PlanError(recipe.name, [Problem(message, "parallel")])
