"""Which weights a recipe trains, which it only uses, and what it holds besides: adapters, frozen parts, a reference."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from launcher.planning.activations import ADAPTED_FAMILIES, ADAPTED_MATRICES, ATTENTION_INPUTS, LayerAdapter
from launcher.planning.families import list_parameters
from launcher.planning.parameters import ParameterTensor
from launcher.planning.sharding import layer_of
from launcher.recipe.schema import Recipe
from launcher.recipe.task_sections import AdapterSection

_PEFT_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text"), ("q_proj", "v_proj")),
    **dict.fromkeys(("qwen2", "qwen3", "opt"), ("q_proj", "v_proj")),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "mpt": ("Wqkv",),
}
"""peft's own choice of a family's modules (`peft/utils/constants.py`), where a recipe names none."""

_TRANSPOSED = frozenset({"gpt2"})
"""Families whose matrices lie as [in, out] (transformers' `Conv1D`)."""

_LORA = frozenset({"lora", "rslora", "dora"})


@dataclass(frozen=True)
class Parts:
    """The parameters of a model in training.

    Attributes:
        parameters: all of them, those of an adapter after the matrix that each belongs to.
        frozen: names of those that are not trained.
        references: copies of the model that each rank holds whole besides, whatever the ZeRO stage.
        rows: texts that a sample brings into a micro batch.
    """

    parameters: tuple[ParameterTensor, ...]
    frozen: frozenset[str] = frozenset()
    references: int = 0
    rows: int = 1


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
        parameters = list(_adapted(parameters, recipe.adapter, config["model_type"]))
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
        rows=2 if recipe.task == "preference" else 1,
    )


def _is_frozen(name: str, recipe: Recipe) -> bool:
    """As `launcher.models.adapters.freeze` decides."""
    matches = any(fnmatchcase(name, pattern) for pattern in recipe.model.freeze)
    return matches and not any(fnmatchcase(name, pattern) for pattern in recipe.model.unfreeze)


def _adapted(
    parameters: Sequence[ParameterTensor], section: AdapterSection, model_type: str
) -> Iterator[ParameterTensor]:
    """The parameters with LoRA's two matrices (arXiv 2106.09685), and DoRA's magnitudes, after each that they adapt."""
    targets = section.target_modules or _PEFT_TARGETS[model_type]
    for tensor in parameters:
        yield tensor
        module = tensor.name.removesuffix(".weight")
        if module == tensor.name or not _is_target(tensor, module, targets):
            continue
        rows, columns = tensor.shape if model_type not in _TRANSPOSED else tensor.shape[::-1]
        yield ParameterTensor(f"{module}.lora_A.weight", (section.r, columns))
        yield ParameterTensor(f"{module}.lora_B.weight", (rows, section.r))
        if section.method == "dora":
            yield ParameterTensor(f"{module}.lora_magnitude_vector.weight", (rows,))


def _is_target(tensor: ParameterTensor, module: str, targets: Sequence[str]) -> bool:
    named = any(module == target or module.endswith(f".{target}") for target in targets)
    return named and len(tensor.shape) == 2 and layer_of(tensor) is not None


def layer_adapter(recipe: Recipe, config: Mapping[str, Any]) -> LayerAdapter | None:
    """The adapter under which a recipe's activations are known; `None` without one, and where they are not."""
    section = recipe.adapter
    if section is None or section.method not in ("lora", "rslora") or section.lora_dropout:
        return None
    named = section.target_modules or _PEFT_TARGETS.get(config["model_type"], ())
    targets = frozenset(name.rpartition(".")[2] for name in named)
    known = config["model_type"] in ADAPTED_FAMILIES and targets <= ADAPTED_MATRICES
    return LayerAdapter(section.r, targets) if known and targets & ATTENTION_INPUTS else None


def counts_too_much(recipe: Recipe, config: Mapping[str, Any]) -> bool:
    """Whether activations are counted as if all of the model were trained, although a part is."""
    return bool(recipe.model.freeze) or (recipe.adapter is not None and layer_adapter(recipe, config) is None)


def uncounted_adapter_reason(section: AdapterSection, model_type: str | None) -> str | None:
    """Say why the memory of an adapter is not counted; `None` when it is."""
    if section.method not in _LORA:
        return f"{section.method} is not counted; lora, rslora and dora are"
    if section.modules_to_save:
        return "modules_to_save are held twice"
    if not section.target_modules and model_type not in _PEFT_TARGETS:
        return f"which modules of {model_type} peft adapts is not known here; name them in adapter.target_modules"
    outside = [name for name in section.target_modules if name.rpartition(".")[2] in _OUTSIDE]
    if outside:
        return f"{', '.join(outside)} lies outside of the layers"
    return None


_OUTSIDE = frozenset({"lm_head", "embed_tokens", "wte", "wpe", "embed_out", "embed_in", "embed_positions"})
