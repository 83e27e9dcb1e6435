"""Kinds of training whose memory the planner does not count: it counts language models."""

from launcher.planning.trained import uncounted_adapter_reason
from launcher.recipe.schema import Recipe
from launcher.recipe.tasks import TASKS


def uncounted_task_reason(recipe: Recipe, model_type: str | None = None) -> str | None:
    """Say why a recipe's memory is not counted; `None` when it can be."""
    if not TASKS[recipe.task].generates:
        return f"task {recipe.task} puts a head of its own on the model"
    if recipe.adapter is not None and (reason := uncounted_adapter_reason(recipe.adapter, model_type)):
        return reason
    if recipe.distillation is not None:
        return "the teacher, or what it said, is held besides"
    if recipe.training.adversarial is not None:
        return "adversarial training runs the model more than once a step"
    return None


def unsearched_reason(recipe: Recipe) -> str | None:
    """Say why no layout is searched for a recipe whose memory is counted; `None` when one is."""
    if recipe.adapter is not None or recipe.model.freeze:
        return "it is trained in part, which is data parallel"
    if recipe.task != "causal_lm":
        return f"task {recipe.task} is data parallel"
    return None
