"""The plan: recipe + resources, resolved. What `plan` prints is what `run` and `submit` use: this one object.

Pure: no torch, ray, deepspeed or transformers below this module.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from launcher.planning.layout import BatchPlan, Layout, Resources
from launcher.planning.memory import MemoryPlan
from launcher.planning.model_shape import ModelShape
from launcher.recipe.schema import Recipe


class Plan(BaseModel):
    """What every worker of a run obeys; `plan.json` holds it.

    Attributes:
        version: of this form; a reader refuses a newer one.
        recipe: the resolved recipe.
        resources: what the profile gives: nodes, workers per node, device.
        layout: sizes of the parallel groups.
        batch: micro batch, accumulation and global batch.
        zero_stage: 0-3.
        model: shape and parameter count; `None` when the config can't be read here (a hub name) or the family is not known.
        memory: bytes per rank of the model states; `None` when `model` is.
        deepspeed_config: the exact JSON that `deepspeed.initialize` gets.
        notes: what a person should know, such as why `model` is `None`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    version: Literal[1] = 1
    recipe: Recipe
    resources: Resources
    layout: Layout
    batch: BatchPlan
    zero_stage: int
    model: ModelShape | None
    memory: MemoryPlan | None
    deepspeed_config: dict[str, Any]
    notes: tuple[str, ...] = ()


def make_plan(recipe: Recipe, resources: Resources) -> Plan:
    """Resolve a recipe on given resources.

    Raises:
        PlanError: they do not go together; the text lists every clash and what to set instead.
        RecipeError: the DeepSpeed JSON that the recipe names is wrong.
    """
    raise NotImplementedError
