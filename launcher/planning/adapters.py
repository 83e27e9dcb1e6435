"""The parameters that an adapter of peft adds to a model, from the recipe and the model's config alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from launcher.planning.families import FAMILIES, resolve
from launcher.planning.parameters import ParameterTensor
from launcher.planning.sharding import layer_of
from launcher.recipe.task_sections import AdapterSection

_LORA = frozenset({"lora", "rslora", "dora"})

LORA_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text"), ("q_proj", "v_proj")),
    **dict.fromkeys(("qwen2", "qwen3", "opt"), ("q_proj", "v_proj")),
    "gpt2": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "mpt": ("Wqkv",),
}
"""peft's own choice of a family's modules (`peft/utils/constants.py`), where a recipe names none."""

IA3_TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral"), ("k_proj", "v_proj", "down_proj")),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("q_proj", "v_proj", "down_proj")),
    "gpt2": ("c_attn", "mlp.c_proj"),
    "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "opt": ("q_proj", "k_proj", "fc2"),
}
"""The same of IA3."""
IA3_FEEDFORWARD: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), ("down_proj",)),
    "gpt2": ("mlp.c_proj",),
    "gpt_neox": ("dense_4h_to_h",),
    "opt": ("fc2",),
}
"""Modules whose input IA3 scales instead of their output (the same file)."""

_TRANSPOSED = frozenset({"gpt2"})
"""Families whose matrices lie as [in, out] (transformers' `Conv1D`)."""

_OUTSIDE = frozenset({"lm_head", "embed_tokens", "wte", "wpe", "embed_out", "embed_in", "embed_positions"})


def adapted(
    parameters: Sequence[ParameterTensor], section: AdapterSection, config: Mapping[str, Any]
) -> Iterator[ParameterTensor]:
    """The parameters of a model with an adapter: after each matrix what adapts it, copies to train after originals.

    Args:
        parameters: of the model.
        section: one whose memory is counted (`uncounted_adapter_reason`).
        config: of transformers.
    """
    family: str = config["model_type"]
    if section.is_prompt:
        yield from parameters
        yield from _prompt(section, config)
        return
    for place, tensor in enumerate(parameters):
        yield tensor
        module = tensor.name.removesuffix(".weight")
        if module != tensor.name and _is_target(tensor, module, targets_of(section, family)):
            yield from _beside(tensor, module, section, family)
        saved = _saved_module(tensor.name, section)
        following = parameters[place + 1].name if place + 1 < len(parameters) else ""
        if saved is not None and not following.startswith(f"{saved}."):
            # peft copies a module whole, so that its parameters come again together
            own = [each for each in parameters if each.name.startswith(f"{saved}.")]
            yield from (_copy(each, saved) for each in own)


def _beside(tensor: ParameterTensor, module: str, section: AdapterSection, family: str) -> Iterator[ParameterTensor]:
    """LoRA's two matrices (arXiv 2106.09685) and DoRA's magnitudes, or IA3's scales, of one matrix."""
    rows, columns = tensor.shape if family not in _TRANSPOSED else tensor.shape[::-1]
    if section.method == "ia3":
        scales_input = any(module.endswith(name) for name in IA3_FEEDFORWARD[family])
        yield ParameterTensor(f"{module}.ia3_l", (1, columns) if scales_input else (rows, 1))
        return
    yield ParameterTensor(f"{module}.lora_A.weight", (section.r, columns))
    yield ParameterTensor(f"{module}.lora_B.weight", (rows, section.r))
    if section.method == "dora":
        yield ParameterTensor(f"{module}.lora_magnitude_vector.weight", (rows,))


def _prompt(section: AdapterSection, config: Mapping[str, Any]) -> Iterator[ParameterTensor]:
    """What stands before the text: a prompt's embedding, p-tuning's with the MLP above it, or keys and values."""
    values = resolve(FAMILIES[config["model_type"]], config)
    hidden, length, name = values["hidden_size"], section.num_virtual_tokens, "prompt_encoder"
    if section.method == "prefix_tuning":  # of the key-value heads only (`peft/utils/other.py`)
        width = 2 * values["num_hidden_layers"] * values["num_key_value_heads"] * values["head_dim"]
        yield ParameterTensor(f"{name}.embedding.weight", (length, width))
        return
    yield ParameterTensor(f"{name}.embedding.weight", (length, hidden))
    if section.method == "p_tuning":
        for layer in (0, 2, 4):  # activations stand between them
            yield ParameterTensor(f"{name}.mlp_head.{layer}.weight", (hidden, hidden))
            yield ParameterTensor(f"{name}.mlp_head.{layer}.bias", (hidden,))


def targets_of(section: AdapterSection, family: str) -> tuple[str, ...]:
    """Ends of the names of the modules that get weights; none where the family is not known here."""
    if section.is_prompt:
        return ()
    chosen = IA3_TARGETS if section.method == "ia3" else LORA_TARGETS
    return section.target_modules or chosen.get(family, ())


def _is_target(tensor: ParameterTensor, module: str, targets: Sequence[str]) -> bool:
    named = any(module == target or module.endswith(f".{target}") for target in targets)
    return named and len(tensor.shape) == 2 and layer_of(tensor) is not None


def _saved_module(name: str, section: AdapterSection) -> str | None:
    """The module of `modules_to_save` that a parameter belongs to."""
    parts = name.split(".")
    modules = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((module for module in modules if module.endswith(tuple(section.modules_to_save))), None)


def _copy(tensor: ParameterTensor, module: str) -> ParameterTensor:
    rest = tensor.name.removeprefix(f"{module}.")
    return tensor._replace(name=f"{module}.modules_to_save.{rest}")


def uncounted_adapter_reason(section: AdapterSection, model_type: str | None, *, tied: bool = False) -> str | None:
    """Say why the memory of an adapter is not counted; `None` when it is.

    Args:
        section: of the recipe.
        model_type: the model's family.
        tied: its head is its embedding.
    """
    if section.method == "adalora":
        return "adalora is not counted; lora, rslora and dora are"
    if section.is_prompt and section.modules_to_save:
        return f"modules_to_save are not counted with {section.method}"
    if section.is_prompt:
        return None
    if not targets_of(section, model_type or "") or (section.method == "ia3" and model_type not in IA3_FEEDFORWARD):
        advice = "take lora, or a family that it knows"
        if section.method in _LORA:
            advice = "name them in adapter.target_modules"
        return f"which modules of {model_type} peft adapts is not known here; {advice}"
    outside = [name for name in section.target_modules if name.rpartition(".")[2] in _OUTSIDE]
    if outside:
        return f"{', '.join(outside)} lies outside of the layers"
    if tied and any(name.rpartition(".")[2] in _OUTSIDE for name in section.modules_to_save):
        return "a head that is tied to the embedding is not saved by itself"
    inside = [name for name in section.modules_to_save if name in targets_of(section, model_type or "")]
    if inside:
        return f"{', '.join(inside)} is adapted and saved"
    return None
