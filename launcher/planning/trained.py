"""Which weights a recipe trains, which it only uses, and what it holds besides: frozen parts, reference, teacher."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from launcher.planning import layer_adapter as layers
from launcher.planning.adapters import adapted, targets_of
from launcher.planning.families import list_parameters
from launcher.planning.layer_adapter import LayerAdapter
from launcher.planning.model_shape import unknown_reason
from launcher.planning.parameters import ParameterTensor
from launcher.recipe.schema import Recipe


@dataclass(frozen=True)
class Parts:
    """The parameters of a model in training.

    Attributes:
        parameters: all of them, those of an adapter after the matrix that each belongs to.
        frozen: names of those that are not trained.
        references: copies of the model that each rank holds whole besides, whatever the ZeRO stage.
        teacher: elements of another model that each rank holds whole, in fp32.
        rows: texts that a sample brings into a micro batch.
        before: positions that a learnt prompt has before each text.
    """

    parameters: tuple[ParameterTensor, ...]
    frozen: frozenset[str] = frozenset()
    references: int = 0
    teacher: int = 0
    rows: int = 1
    before: int = 0


def parts_of(recipe: Recipe, config: Mapping[str, Any]) -> Parts:
    """Divide a model's parameters as a recipe trains them.

    Args:
        recipe: one whose memory is counted (`uncounted.uncounted_task_reason`).
        config: of transformers, of a family that is known.
    """
    parameters: Sequence[ParameterTensor] = list_parameters(config)
    frozen: frozenset[str] = frozenset()
    if recipe.adapter is not None:
        frozen = frozenset(tensor.name for tensor in parameters)
        parameters = list(adapted(parameters, recipe.adapter, config))
    elif recipe.model.freeze:
        frozen = frozenset(tensor.name for tensor in parameters if _is_frozen(tensor.name, recipe))
    preference, kto = recipe.preference, recipe.kto
    compares = (recipe.task == "kto" and not kto.precompute_reference) or (
        recipe.task == "preference" and preference.has_reference and not preference.precompute_reference
    )
    return Parts(
        tuple(parameters),
        frozen,
        references=int(compares and recipe.adapter is None),
        teacher=_teacher_elements(recipe),
        rows=2 if recipe.task == "preference" else 1,
        before=recipe.adapter.num_virtual_tokens if recipe.adapter is not None and recipe.adapter.is_prompt else 0,
    )


def _teacher_elements(recipe: Recipe) -> int:
    config = teacher_config(recipe)
    return 0 if config is None else sum(tensor.numel for tensor in list_parameters(config))


def teacher_config(recipe: Recipe) -> dict[str, Any] | None:
    """The config of a distillation's teacher; `None` without one, and where it cannot be read here or counted."""
    if recipe.distillation is None:
        return None
    path = Path(recipe.distillation.teacher_name_or_path).expanduser() / "config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) and unknown_reason(config) is None else None


def _is_frozen(name: str, recipe: Recipe) -> bool:
    """As `launcher.models.adapters.freeze` decides."""
    matches = any(fnmatchcase(name, pattern) for pattern in recipe.model.freeze)
    return matches and not any(fnmatchcase(name, pattern) for pattern in recipe.model.unfreeze)


def layer_adapter(recipe: Recipe, config: Mapping[str, Any]) -> LayerAdapter | None:
    """The adapter under which a recipe's activations are known; `None` without one, and where they are not."""
    section = recipe.adapter
    if section is None or section.method not in ("lora", "rslora", "dora"):
        return None
    if not set(section.modules_to_save) <= {"lm_head", "embed_tokens"}:
        return None
    named = targets_of(section, config["model_type"])
    targets = frozenset(name.rpartition(".")[2] for name in named)
    known = config["model_type"] in layers.FAMILIES and targets <= layers.MATRICES
    if not known or not targets & layers.ATTENTION_INPUTS:
        return None
    return LayerAdapter(
        section.r,
        targets,
        scaled=section.method == "dora",
        dropout=section.lora_dropout > 0,
        head="lm_head" in section.modules_to_save,
        embedding="embed_tokens" in section.modules_to_save,
    )


def counts_too_much(recipe: Recipe, config: Mapping[str, Any]) -> bool:
    """Whether activations are counted as if all of the model were trained, although a part is."""
    return bool(recipe.model.freeze) or (recipe.adapter is not None and layer_adapter(recipe, config) is None)
