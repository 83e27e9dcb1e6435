"""Every legal way to run a recipe: groups, ZeRO stage, offload, micro batch and recomputation.

Legal is what `combinations.COMBINATIONS` has a row for, and what the model's sizes divide into. What a recipe sets of
ZeRO and recomputation stays; groups, micro batch and accumulation are searched, the global batch is kept.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from launcher.planning.combinations import COMBINATIONS, Combination, model_problems
from launcher.planning.compiling import compile_problems
from launcher.planning.fit import with_checkpointing
from launcher.planning.layout import BatchPlan, Layout, Resources, divisors, make_batch, make_layout
from launcher.planning.methods import method_problems
from launcher.planning.model_shape import model_shape
from launcher.planning.optimizers import optimizer_problems
from launcher.planning.tiling import tiling_problems
from launcher.recipe.layout_sections import ParallelSection
from launcher.recipe.schema import Recipe, reads_packed_text

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


def choices(recipe: Recipe, config: Mapping[str, Any], resources: Resources) -> Iterator[Choice]:
    """Enumerate every legal choice."""
    shape = model_shape(config)
    size = global_batch(recipe, resources)
    set_checkpointing = "gradient_checkpointing" in recipe.training.model_fields_set
    recomputations = (recipe.training.gradient_checkpointing,) if set_checkpointing else (False, True)
    for row in COMBINATIONS:
        if recipe.training.precision not in row.precisions or (row.groups and is_data_parallel(recipe)):
            continue
        zeros = list(_zeros(recipe, row, resources.device))
        for layout in _layouts(row, resources.world_size):
            batches = _batches(recipe, size, layout)
            if not batches or model_problems(config, layout, recipe, shape):
                continue
            legal = [zero for zero in zeros if _trains_under(recipe, config, layout, *zero)]
            for (stage, optimizer, param), batch, recomputes in product(legal, batches, recomputations):
                yield Choice(layout, stage, optimizer, param, batch, recomputes)


def is_data_parallel(recipe: Recipe) -> bool:
    """Whether a recipe is for data parallel runs alone, as `recipe.schema` says of sizes that it sets itself."""
    in_part = recipe.adapter is not None or bool(recipe.model.freeze or recipe.model.unfreeze)
    layers = recipe.optimizer.layer_wise_lr_decay is not None or recipe.optimizer.unfreeze_every_steps is not None
    return in_part or layers or recipe.distillation is not None or not reads_packed_text(recipe)


def _trains_under(
    recipe: Recipe, config: Mapping[str, Any], layout: Layout, stage: int, optimizer: str, param: str
) -> bool:
    """Whether the recipe's optimizer, compiler, methods and parts of the sequence go with a stage and its offload."""
    offloads = (optimizer, param) != ("none", "none")
    sections = {"offload_optimizer": {"device": optimizer}, "offload_param": {"device": param}}
    problems = [
        *compile_problems(config, layout, stage, recipe),
        *tiling_problems(config, layout, recipe),
        *method_problems(recipe, layout, stage, {"zero_optimization": sections}),
        *optimizer_problems(recipe, layout, stage, offloads),
    ]
    return not problems


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


def _batches(recipe: Recipe, size: int, layout: Layout) -> list[BatchPlan]:
    samples, rest = divmod(size, layout.data_parallel_size)
    if rest:
        return []
    smallest = 2 if recipe.task == "kto" else 1  # KTO compares the samples of a micro batch with one another
    return [
        BatchPlan(micro_batch_size=micro, gradient_accumulation_steps=samples // micro, global_batch_size=size)
        for micro in divisors(samples)
        if smallest <= micro <= LARGEST_MICRO_BATCH
    ]


def global_batch(recipe: Recipe, resources: Resources) -> int:
    """The recipe's, or the one that its micro batch gives on its own layout."""
    if recipe.training.global_batch_size is not None:
        return recipe.training.global_batch_size
    return make_batch(recipe, make_layout(recipe, resources)).global_batch_size  # `auto`: of data parallelism alone
