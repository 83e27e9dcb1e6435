"""Whether and how a plan can continue from a checkpoint. Decided before a worker starts, from the two records alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.checkpoints.manifest import Manifest
from launcher.errors import CheckpointError
from launcher.planning.layout import Layout
from launcher.planning.plan import Plan, replan
from launcher.recipe.loading import differences
from launcher.recipe.training_sections import OptimizerSection

FIXED_SECTIONS = ("task", "seed", "model", "tokenizer", "data", "optimizer.type")
"""Recipe sections that a resumed run must share with its checkpoint; the others (schedule, batch, ...) may change."""
FREE_FIELDS = ("data.cache_directory", "data.preprocessing_num_workers", "data.on_change", "model.kernels")
"""Fields in them that change nothing of what is learned."""
LAYERED = ("optimizer.layer_wise_lr_decay", "optimizer.unfreeze_every_steps")
BATCH_FIELDS = tuple(
    f"training.{name}" for name in ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size")
)
MODEL_PARALLEL = ("tensor_parallel_size", "pipeline_parallel_size", "sequence_parallel_size", "expert_parallel_size")
PARTITIONING = ("sub_group_size", "round_robin_gradients", "parameter_alignment", "offload_optimizer", "offload_param")
"""Keys of `zero_optimization` on which it depends which rank holds what, and where."""


@dataclass(frozen=True)
class Resumption:
    """How a plan continues from a checkpoint.

    Attributes:
        differences: of the layouts, a line each; empty when the engine can load its files as they are.
        data_changed: the data is not that of the checkpoint, and the recipe allows it.
    """

    differences: tuple[str, ...]
    data_changed: bool


def partitioning_of(deepspeed_config: dict[str, Any]) -> dict[str, Any]:
    """What of a DeepSpeed config decides how ZeRO cuts the states, besides the stage."""
    zero = deepspeed_config.get("zero_optimization", {})
    settings = {key: zero[key] for key in PARTITIONING if key in zero}
    for key in ("offload_optimizer", "offload_param"):
        if key in settings:
            settings[key] = settings[key].get("device", "none")
    return {key: value for key, value in settings.items() if value != "none"}


def with_batch_of(manifest: Manifest, plan: Plan) -> Plan:
    """The plan with the checkpoint's global batch, reached by another accumulation or a smaller micro batch.

    A recipe whose batch sizes are not those of the checkpoint's recipe says that the batch is meant to change.

    Raises:
        PlanError: this number of workers cannot keep the global batch; lists those that can.
    """
    size = manifest.batch.global_batch_size
    if plan.batch.global_batch_size == size or differences(manifest.recipe, plan.recipe, BATCH_FIELDS):
        return plan
    wanted = plan.model_copy(update={"batch": plan.batch.model_copy(update={"global_batch_size": size})})
    return replan(wanted, plan.layout.world_size)


def unconvertible_reason(manifest: Manifest) -> str | None:
    """Why a checkpoint has no universal form, or None when it has one."""
    if manifest.layout.expert_parallel_size > 1:
        return f"its experts are spread over expert_parallel_size {manifest.layout.expert_parallel_size}"
    if manifest.recipe.adapter is not None:
        return "an adapter's checkpoint is continued in its own layout"
    if manifest.recipe.optimizer.type not in ("adamw", "sgd"):
        return f"the states of {manifest.recipe.optimizer.type} are continued in their own layout"
    if manifest.zero_stage == 0 and manifest.precision != "fp32":
        return f"in {manifest.precision}, DeepSpeed keeps the optimizer of ZeRO stage 0 in a form of its own"
    return None


def recipe_changes(manifest: Manifest, plan: Plan) -> list[str]:
    """What the checkpoint learned from or with that the plan would change, a line each; empty when it can continue."""
    changes = [
        line
        for line in differences(manifest.recipe, plan.recipe, FIXED_SECTIONS)
        if not line.startswith(tuple(f"{field}:" for field in FREE_FIELDS))
    ]
    if has_layers(manifest.recipe.optimizer) != has_layers(plan.recipe.optimizer):
        changes += differences(manifest.recipe, plan.recipe, LAYERED)
    return changes


def has_layers(optimizer: OptimizerSection) -> bool:
    """Whether each layer is a group of its own, whose states stand in the checkpoint group by group."""
    return optimizer.layer_wise_lr_decay is not None or optimizer.unfreeze_every_steps is not None


def check_resumable(manifest: Manifest, plan: Plan, data_fingerprint: str, folder: Path) -> Resumption:
    """Decide how a plan continues from a checkpoint.

    Raises:
        CheckpointError: it cannot; says every reason, and what to do.
    """
    data_changed = _check_recipe(manifest, plan, data_fingerprint, folder)
    different = _layout_differences(manifest, plan)
    obstacles = _obstacles(manifest, plan, different)
    if obstacles:
        raise CheckpointError(
            f"checkpoint {folder} was saved in another layout, from which this plan cannot continue:\n  "
            + "\n  ".join(obstacles)
            + "\nRun with the checkpoint's values, or start a new run with --run-dir."
        )
    return Resumption(tuple(different), data_changed)


def _check_recipe(manifest: Manifest, plan: Plan, data_fingerprint: str, folder: Path) -> bool:
    """Refuse another model or, unless `data.on_change` says otherwise, other data; returns whether the data differs."""
    changed = recipe_changes(manifest, plan)
    of_data = [line for line in changed if line.startswith("data.")]
    others = [line for line in changed if not line.startswith("data.")]
    if not changed and manifest.data_fingerprint != data_fingerprint:
        of_data = ["data: the files' contents are not those of the checkpoint"]
    may_change = plan.recipe.data.on_change != "error"
    refused = others if may_change else others + of_data
    if refused:
        advice = "Start a new run with --run-dir, or give the recipe the checkpoint's values."
        if not others:
            advice += (
                " To go on with other data in this run, set data.on_change: continue (from the same position) or "
                "restart (from its beginning)."
            )
        raise CheckpointError(
            f"the run in {folder.parent.parent} was trained with another recipe:\n  "
            + "\n  ".join(refused)
            + f"\n{advice}"
        )
    return bool(of_data) or manifest.data_fingerprint != data_fingerprint


def _layout_differences(manifest: Manifest, plan: Plan) -> list[str]:
    """Why the engine cannot load the checkpoint's files as they are."""
    then, now = _shape(manifest.layout), _shape(plan.layout)
    stages = {manifest.zero_stage, plan.zero_stage}
    if stages == {0} and all(then[name] == now[name] for name in MODEL_PARALLEL):
        return []  # every rank holds everything
    shape: dict[str, tuple[Any, Any]] = {}
    if not stages <= {1, 2}:  # these two cut and name their states alike
        shape["zero.stage"] = (manifest.zero_stage, plan.zero_stage)
    shape |= {name: (then[name], now[name]) for name in then}
    cut, cut_now = manifest.partitioning, partitioning_of(plan.deepspeed_config)
    shape |= {f"zero_optimization.{key}": (cut.get(key), cut_now.get(key)) for key in sorted({*cut, *cut_now})}
    return [f"{name}: {old} in the checkpoint, {new} now" for name, (old, new) in shape.items() if old != new]


def _shape(layout: Layout) -> dict[str, int]:
    sizes: dict[str, int] = layout.model_dump()
    return sizes


def _obstacles(manifest: Manifest, plan: Plan, different: list[str]) -> list[str]:
    """Differences that no conversion bridges."""
    obstacles = []
    precision = plan.recipe.training.precision
    if manifest.precision != precision:
        obstacles.append(f"training.precision: {manifest.precision} in the checkpoint, {precision} now")
    if different and not obstacles:
        now = manifest.model_copy(update={"layout": plan.layout, "zero_stage": plan.zero_stage})
        reason = unconvertible_reason(manifest) or unconvertible_reason(now)
        if reason is None and plan.zero_stage == 0 and plan.layout.model_parallel_size > 1:
            reason = "under ZeRO 0, tensor- and sequence-parallel ranks load their own layout only; set zero.stage to 1"
        if reason is not None:
            obstacles += [*different, f"it cannot be converted: {reason}"]
    return obstacles
