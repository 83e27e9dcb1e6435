"""Kinds of training whose memory the planner does not count: it counts language models that are trained whole."""

from launcher.recipe.schema import Recipe
from launcher.recipe.tasks import TASKS


def uncounted_task_reason(recipe: Recipe) -> str | None:
    """Say why a recipe's memory is not counted, whatever its model; `None` when it can be."""
    if not TASKS[recipe.task].generates:
        return f"task {recipe.task} puts a head of its own on the model"
    if recipe.adapter is not None:
        return "an adapter has gradients and optimizer states for its own weights only"
    if recipe.model.freeze or recipe.model.unfreeze:
        return "frozen weights have neither gradients nor optimizer states"
    if recipe.distillation is not None:
        return "the teacher is held besides"
    if recipe.task in ("preference", "kto"):
        return "each sample is two texts, and a reference model may be held besides"
    if recipe.training.adversarial is not None:
        return "adversarial training runs the model more than once a step"
    return None
