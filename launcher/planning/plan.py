"""The plan: recipe + resources, resolved. What `plan` prints is what `run` and `submit` use: this one object.

Pure: no torch, ray, deepspeed or transformers below this module.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict

from launcher.errors import PlanError, Problem
from launcher.planning.combinations import balance_problems, combination_problems, model_problems
from launcher.planning.compiling import compile_problems
from launcher.planning.deepspeed_config import DeepSpeedPlan, make_deepspeed_config, with_batch
from launcher.planning.estimate import StepEstimate, estimate_ranks, estimate_step, machine_of, states_by_zero_stage
from launcher.planning.fit import Candidate, fit_problems
from launcher.planning.kept_states import kept_problems
from launcher.planning.layout import (
    BatchPlan,
    Layout,
    Resources,
    divisors,
    make_batch,
    make_layout,
    resize_batch,
)
from launcher.planning.memory import MemoryPlan, uncounted_reason
from launcher.planning.methods import method_problems
from launcher.planning.model_shape import (
    ModelShape,
    check_model,
    model_shape,
    unknown_reason,
    unread_fields,
)
from launcher.planning.optimizers import optimizer_problems
from launcher.planning.rank_memory import RankMemory
from launcher.planning.search import SearchResult, nothing_fits, search
from launcher.planning.stages import pipeline_stages
from launcher.planning.tiling import tiling_problems
from launcher.planning.trained import counts_too_much
from launcher.planning.uncounted import uncounted_task_reason, unsearched_reason
from launcher.planning.zero_settings import OFFLOADS, device_problems, zero_problems
from launcher.recipe.schema import Recipe
from launcher.recipe.tasks import TASKS

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Plan(BaseModel):
    """What every worker of a run obeys; `plan.json` holds it.

    Attributes:
        version: of this form; a reader refuses a newer one.
        recipe: the resolved recipe.
        resources: what the profile gives: nodes, workers per node, device.
        layout: sizes of the parallel groups.
        stage_borders: the first decoder layer of each pipeline stage, and the number of layers; `None` without stages.
        batch: micro batch, accumulation and global batch.
        zero_stage: 0-3.
        transformers_config: what the model is built from, the vocabulary size filled in; `None` for a hub name.
        model: shape and parameter count; `None` when the config can't be read here (a hub name) or the family is not
            known.
        memory: bytes per rank of the model states; `None` when `model` is, or when a DeepSpeed setting is not counted.
        memory_by_stage: the same under each ZeRO stage, for comparison.
        ranks: everything that the ranks of each pipeline stage hold; `None` when `memory` is.
        step: how long an optimizer step takes; `None` when the model or the accelerator is not known.
        deepspeed_config: the exact JSON that `deepspeed.initialize` gets.
        notes: what a person should know, such as why `model` is `None`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    version: Literal[1] = 1
    recipe: Recipe
    resources: Resources
    layout: Layout
    stage_borders: tuple[int, ...] | None = None
    batch: BatchPlan
    zero_stage: int
    transformers_config: dict[str, Any] | None = None
    model: ModelShape | None
    memory: MemoryPlan | None
    memory_by_stage: dict[int, MemoryPlan] | None = None
    ranks: tuple[RankMemory, ...] | None = None
    step: StepEstimate | None = None
    deepspeed_config: dict[str, Any]
    notes: tuple[str, ...] = ()


def make_plan(recipe: Recipe, resources: Resources) -> Plan:
    """Resolve a recipe on given resources.

    Raises:
        PlanError: they do not go together, or a file that the recipe names is missing or wrong; the text lists every
            clash of layout, batch, model and DeepSpeed config, and what to set instead.
    """
    recipe = _resolved(recipe, resources)
    problems: list[Problem] = []
    layout = _collect(problems, make_layout, recipe, resources)
    batch = None if layout is None else _collect(problems, make_batch, recipe, layout)
    config = _collect(problems, check_model, recipe)
    if layout is None or batch is None:
        # The rest of the DeepSpeed config is checked all the same, so that its problems are told at once.
        layout = layout or Layout(world_size=resources.world_size, data_parallel_size=resources.world_size)
        batch = BatchPlan(
            micro_batch_size=recipe.training.micro_batch_size or 1,
            gradient_accumulation_steps=recipe.training.gradient_accumulation_steps or 1,
            global_batch_size=recipe.training.global_batch_size or 1,
        )
    deepspeed = _collect(problems, make_deepspeed_config, recipe, layout, batch, (config or {}).get("model_type"))
    if deepspeed is not None:
        offloads = {deepspeed.offload_optimizer, deepspeed.offload_param} != {"none"}
        problems += combination_problems(layout, deepspeed.zero_stage, recipe.training.precision, offloads)
        problems += optimizer_problems(recipe, layout, deepspeed.zero_stage, offloads)
        problems += method_problems(recipe, layout, deepspeed.zero_stage, deepspeed.config)
    problems += kept_problems(recipe, layout)
    if config is not None:
        problems += model_problems(config, layout, recipe)
        problems += balance_problems(config, recipe)
    elif layout.pipeline_parallel_size > 1:
        message = "a model on the hub is not cut into stages; download it, and name its folder in model_name_or_path"
        problems.append(Problem(message, "parallel.pipeline_parallel_size"))
    problems += tiling_problems(config or {}, layout, recipe)
    if deepspeed is not None:
        problems += compile_problems(config or {}, layout, deepspeed.zero_stage, recipe)
    machine = _collect(problems, machine_of, resources, {})
    accelerator = None if machine is None else machine.accelerator
    if accelerator is not None and resources.device == "cuda" and recipe.training.precision not in accelerator.peak:
        formats = " or ".join(name for name in accelerator.peak if name != "fp8")
        message = f"is {recipe.training.precision}, which {accelerator.name} does not compute in; set it to {formats}"
        problems.append(Problem(message, "training.precision"))
    if not problems and deepspeed is not None and config is not None and _is_counted(recipe, config):
        problems += fit_problems(Candidate(recipe, config, layout, batch, deepspeed, resources))
    if problems or deepspeed is None:
        raise PlanError(recipe.name, problems)
    return _assemble(recipe, resources, layout, batch, config, deepspeed)


def _is_counted(recipe: Recipe, config: Mapping[str, Any]) -> bool:
    """Whether all that a recipe's ranks hold is counted, and not too much of it."""
    uncounted = uncounted_task_reason(recipe, config.get("model_type"))
    return uncounted is None and model_shape(config) is not None and not counts_too_much(recipe, config)


def _resolved(recipe: Recipe, resources: Resources) -> Recipe:
    """The recipe with the planner's choice in the place of `parallel: auto`."""
    if not recipe.parallel.auto:
        return recipe
    result = search_layouts(recipe, resources)
    if not result.best:
        raise PlanError(recipe.name, [Problem(nothing_fits(result), "parallel")])
    return result.best[0].choice.applied(recipe)


def search_layouts(recipe: Recipe, resources: Resources) -> SearchResult:
    """Judge every legal layout of a recipe on given resources.

    Raises:
        PlanError: the model or the accelerator is not known, or the recipe is wrong.
    """
    config = check_model(recipe)
    shape = None if config is None else model_shape(config)
    if reason := uncounted_task_reason(recipe, (config or {}).get("model_type")):
        raise PlanError(recipe.name, [Problem(f"no layout can be chosen: memory is not counted: {reason}", "parallel")])
    if reason := unsearched_reason(recipe):
        raise PlanError(recipe.name, [Problem(f"no layout can be chosen: {reason}; leave parallel out", "parallel")])
    if problems := device_problems({name: getattr(recipe.zero, name) for name in OFFLOADS}):
        raise PlanError(recipe.name, problems)
    if config is None or shape is None:
        reason = "its config is on the hub and is not read here" if config is None else unknown_reason(config)
        message = f"no layout can be chosen without the model, but {reason}; name a folder that holds config.json"
        raise PlanError(recipe.name, [Problem(message, "parallel")])
    return search(recipe, config, shape, resources)


def replan(plan: Plan, world_size: int) -> Plan:
    """Plan the same run on another number of workers: same global batch, new data-parallel size and accumulation.

    The micro batch stays as it is, or becomes the largest smaller one that fits. Nothing is read from disk: the new
    plan is a function of the old one.

    Raises:
        PlanError: the global batch can't be kept at this size; the text lists the sizes that work.
    """
    replicas, rest = divmod(world_size, plan.layout.model_parallel_size)
    experts = plan.layout.expert_parallel_size
    batch = None if rest or replicas < 1 or replicas % experts else resize_batch(plan.batch, replicas)
    if batch is None:
        kept = [size for size in divisors(plan.batch.global_batch_size) if size % experts == 0]
        fits = ", ".join(str(size * plan.layout.model_parallel_size) for size in kept)
        message = (
            f"{world_size} workers cannot keep global_batch_size {plan.batch.global_batch_size}; sizes that can: {fits}"
        )
        raise PlanError(plan.recipe.name, [Problem(message, "training.global_batch_size")])
    layout = plan.layout.model_copy(update={"world_size": world_size, "data_parallel_size": replicas})
    zero = plan.deepspeed_config["zero_optimization"]
    if problems := zero_problems(zero, layout):
        raise PlanError(plan.recipe.name, problems)
    deepspeed = DeepSpeedPlan(
        config=with_batch(plan.deepspeed_config, batch),
        source="plan.json",
        zero_stage=plan.zero_stage,
        offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none"),
        offload_param=zero.get("offload_param", {}).get("device", "none"),
    )
    resources = plan.resources.resized(world_size)
    return _assemble(plan.recipe, resources, layout, batch, plan.transformers_config, deepspeed)


def _assemble(
    recipe: Recipe,
    resources: Resources,
    layout: Layout,
    batch: BatchPlan,
    config: Mapping[str, Any] | None,
    deepspeed: DeepSpeedPlan,
) -> Plan:
    model = model_shape(config) if config is not None and TASKS[recipe.task].generates else None
    counted = uncounted_task_reason(recipe, (config or {}).get("model_type")) is None
    by_stage = ranks = step = None
    if counted and config is not None and model is not None and uncounted_reason(deepspeed.config) is None:
        by_stage = states_by_zero_stage(recipe, config, layout, deepspeed)
        ranks = estimate_ranks(recipe, config, layout, batch, deepspeed, resources.device)
    if config is not None and model is not None:
        step = estimate_step(recipe, config, model, layout, batch, deepspeed, resources)
    return Plan(
        recipe=recipe,
        resources=resources,
        layout=layout,
        stage_borders=_stage_borders(recipe, layout, config),
        batch=batch,
        zero_stage=deepspeed.zero_stage,
        transformers_config=None if config is None else dict(config),
        model=model,
        memory=None if by_stage is None else by_stage[deepspeed.zero_stage],
        memory_by_stage=by_stage,
        ranks=ranks,
        step=step,
        deepspeed_config=deepspeed.config,
        notes=tuple(_notes(recipe, resources, layout, config, deepspeed)),
    )


def _stage_borders(recipe: Recipe, layout: Layout, config: Mapping[str, Any] | None) -> tuple[int, ...] | None:
    if config is None or layout.pipeline_parallel_size == 1:
        return None
    return pipeline_stages(config, layout, recipe.parallel.pipeline_partition, recipe.data.sequence_length)


def _notes(
    recipe: Recipe,
    resources: Resources,
    layout: Layout,
    config: Mapping[str, Any] | None,
    deepspeed: DeepSpeedPlan,
) -> list[str]:
    notes = []
    if config is None:
        notes.append(
            f"the config of {recipe.model.model_name_or_path} is on the hub and is not read here: "
            "parameters, memory and longest sequence are not checked"
        )
    elif reason := uncounted_task_reason(recipe, config.get("model_type")):
        notes.append(f"memory is not counted: {reason}")
    elif reason := unknown_reason(config):
        notes.append(f"parameters and memory are not counted: {reason}")
    elif counts_too_much(recipe, config):
        notes.append("activations are counted as if all of the model were trained: they are less")
    if unread := unread_fields(recipe):
        notes.append(f"model.config: transformers knows no {', '.join(unread)} in this family, and ignores it")
    if reason := uncounted_reason(deepspeed.config):
        notes.append(f"memory is not counted: {reason}")
    if resources.device == "cpu" and recipe.training.precision == "fp16":
        notes.append(
            "fp16 on CPU needs a processor that computes in it (AVX512-FP16 or AMX); DeepSpeed refuses the others"
        )
    if layout.pipeline_parallel_size > 1 and recipe.parallel.pipeline_partition == "time":
        notes.append("memory is counted for stages of equal parameters, not for those of equal time")
    return notes


def _collect(
    problems: list[Problem], function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> Result | None:
    """Call one step of the planning; what it finds wrong is kept, so that the other steps can be asked too."""
    try:
        return function(*args, **kwargs)
    except PlanError as error:
        problems += error.problems
        return None
