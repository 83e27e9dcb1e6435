"""Kinds of training whose memory the planner does not count: it counts language models."""

from collections.abc import Mapping
from typing import Any

from launcher.planning.adapters import uncounted_adapter_reason
from launcher.planning.families import FAMILIES, resolve
from launcher.planning.trained import teacher_config
from launcher.recipe.schema import Recipe
from launcher.recipe.task_sections import AdapterSection, DistillationSection
from launcher.recipe.tasks import TASKS


def uncounted_task_reason(recipe: Recipe, config: Mapping[str, Any] | None = None) -> str | None:
    """Say why a recipe's memory is not counted; `None` when it can be."""
    if not TASKS[recipe.task].generates:
        return f"task {recipe.task} puts a head of its own on the model"
    if recipe.adapter is not None and (reason := _adapter_reason(recipe.adapter, config or {})):
        return reason
    if recipe.distillation is not None and (reason := _teacher_reason(recipe, recipe.distillation)):
        return reason
    if recipe.training.adversarial is not None:
        return "adversarial training runs the model more than once a step"
    return None


def _teacher_reason(recipe: Recipe, section: DistillationSection) -> str | None:
    if section.precompute:
        return "what the teacher said is held besides"
    if section.compares_layers:
        return "hidden states and attention of both models are held besides"
    if section.zero_stage or section.dtype != "fp32":
        return "the teacher is in parts, or in 16 bits"
    if teacher_config(recipe) is None:
        return f"the config of the teacher {section.teacher_name_or_path} is not known here"
    return None


def _adapter_reason(section: AdapterSection, config: Mapping[str, Any]) -> str | None:
    family = config.get("model_type")
    tied = family in FAMILIES and bool(resolve(FAMILIES[family], config)["tie_word_embeddings"])
    return uncounted_adapter_reason(section, family, tied=tied)
