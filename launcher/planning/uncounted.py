"""Kinds of training whose memory the planner does not count: it counts language models."""

from collections.abc import Mapping
from typing import Any

from launcher.planning.adapters import uncounted_adapter_reason
from launcher.planning.families import FAMILIES, resolve
from launcher.planning.trained import teacher_config
from launcher.recipe.schema import Recipe
from launcher.recipe.task_sections import AdapterSection
from launcher.recipe.tasks import TASKS


def uncounted_task_reason(recipe: Recipe, config: Mapping[str, Any] | None = None) -> str | None:
    """Say why a recipe's memory is not counted; `None` when it can be."""
    if not TASKS[recipe.task].generates:
        return f"task {recipe.task} puts a head of its own on the model"
    if recipe.adapter is not None and (reason := _adapter_reason(recipe.adapter, config or {})):
        return reason
    if recipe.distillation is not None and teacher_config(recipe) is None:
        return f"the config of the teacher {recipe.distillation.teacher_name_or_path} is not known here"
    if recipe.training.adversarial is not None:
        return "adversarial training runs the model more than once a step"
    return None


def _adapter_reason(section: AdapterSection, config: Mapping[str, Any]) -> str | None:
    family = config.get("model_type")
    tied = family in FAMILIES and bool(resolve(FAMILIES[family], config)["tie_word_embeddings"])
    return uncounted_adapter_reason(section, family, tied=tied)
