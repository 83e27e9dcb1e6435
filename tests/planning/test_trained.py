"""Which parameters an adapter adds and which are frozen is what peft and `launcher.models.adapters` make of a model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.utils import constants
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.models.adapters import add_adapter, freeze
from launcher.planning.adapters import IA3_FEEDFORWARD, IA3_TARGETS, LORA_TARGETS
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.planning.trained import parts_of
from launcher.recipe.schema import Recipe
from tests.support.small_models import small

MakeRecipe = Callable[..., Recipe]

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"method": "lora", "r": 4}),
    "dora": ("qwen3", {"method": "dora", "r": 3, "target_modules": ["q_proj", "o_proj", "down_proj"]}),
    "rslora": ("gemma2", {"method": "rslora"}),
    "lora gpt2": ("gpt2", {"method": "lora", "target_modules": ["c_attn", "mlp.c_proj"]}),
    "lora gpt_neox": ("gpt_neox", {"method": "lora"}),
    "lora and its head": ("llama", {"method": "lora", "modules_to_save": ["lm_head"]}),
    "lora and a module": ("qwen2", {"method": "lora", "modules_to_save": ["embed_tokens", "layers.1.mlp"]}),
    **{f"ia3 {family}": (family, {"method": "ia3"}) for family in IA3_TARGETS},
    "ia3 of a few": ("llama", {"method": "ia3", "target_modules": ["q_proj", "up_proj", "down_proj"]}),
    **{
        f"{method} {family}": (family, {"method": method, "num_virtual_tokens": 7})
        for method in ("prefix_tuning", "prompt_tuning", "p_tuning")
        for family in ("llama", "qwen3", "gpt2")
    },
}


def test_peft_chooses_the_modules_that_the_plan_says() -> None:
    tables = {
        "LORA_TARGET_MODULES": LORA_TARGETS,
        "IA3_TARGET_MODULES": IA3_TARGETS,
        "IA3_FEEDFORWARD_MODULES": IA3_FEEDFORWARD,
    }
    for name, table in tables.items():
        theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{name}_MAPPING")
        assert {family: tuple(theirs[family]) for family in table} == table


def model_of(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapters_parameters(name: str, make_recipe: MakeRecipe) -> None:
    family, section = ADAPTERS[name]
    config = small(family)
    recipe = make_recipe({"model.config": config, "adapter": section, "data.packing": "none"})
    parts = parts_of(recipe, config)
    assert recipe.adapter is not None
    adapted = add_adapter(model_of(config), recipe.adapter, "CAUSAL_LM", seed=1)
    is_prompt = recipe.adapter.is_prompt
    real = {plain_name(name, is_prompt=is_prompt): parameter for name, parameter in adapted.named_parameters()}
    planned = {tensor.name: tensor.shape for tensor in parts.parameters}
    assert planned == {name: tuple(parameter.shape) for name, parameter in real.items()}
    assert len(planned) == len(parts.parameters)
    assert parts.frozen == {name for name, parameter in real.items() if not parameter.requires_grad}


def plain_name(name: str, *, is_prompt: bool) -> str:
    """Without what peft puts around and between."""
    name = name.removeprefix("base_model." if is_prompt else "base_model.model.")
    for part in (".base_layer", ".default", ".original_module"):
        name = name.replace(part, "")
    return name


def test_frozen_parameters(make_recipe: MakeRecipe) -> None:
    config = small("llama")
    globs = {"model.freeze": ["*.layers.0.*", "*embed*"], "model.unfreeze": ["*.layers.0.mlp.*"]}
    recipe = make_recipe({"model.config": config, **globs})
    model = model_of(config)
    freeze(model, recipe.model.freeze, recipe.model.unfreeze)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert parts_of(recipe, config).frozen == frozen
    assert len(frozen) > 5


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"method": "adalora"}, "adalora is not counted; lora, rslora and dora are"),
        ({"method": "prompt_tuning", "modules_to_save": ["lm_head"]}, "modules_to_save are not counted with prompt"),
        ({"method": "lora", "modules_to_save": ["q_proj"]}, "q_proj is adapted and saved"),
        ({"method": "lora", "target_modules": ["embed_tokens"]}, "embed_tokens lies outside of the layers"),
    ],
)
def test_other_adapters_are_not_counted(make_recipe: MakeRecipe, adapter: dict[str, Any], reason: str) -> None:
    plan = make_plan(make_recipe({"adapter": adapter, "data.packing": "none"}), Resources())
    assert plan.memory is None
    assert any(note.startswith(f"memory is not counted: {reason}") for note in plan.notes)


def test_a_head_that_is_the_embedding_is_not_counted_twice(make_recipe: MakeRecipe) -> None:
    config = small("llama", tie_word_embeddings=True)
    adapter = {"method": "lora", "modules_to_save": ["lm_head"]}
    plan = make_plan(make_recipe({"model.config": config, "adapter": adapter}), Resources())
    assert "memory is not counted: a head that is tied to the embedding is not saved by itself" in plan.notes


def test_a_family_that_peft_has_no_choice_for_needs_names(make_recipe: MakeRecipe) -> None:
    config = small("olmo2")
    plan = make_plan(make_recipe({"model.config": config, "adapter": {"method": "lora"}}), Resources())
    assert any("which modules of olmo2 peft adapts is not known here" in note for note in plan.notes)
    named = {"method": "lora", "target_modules": ["q_proj"]}
    assert make_plan(make_recipe({"model.config": config, "adapter": named}), Resources()).memory is not None


def test_a_reference_is_held_whole_by_every_rank(make_recipe: MakeRecipe) -> None:
    def parameters(**changes: Any) -> int:
        plan = make_plan(make_recipe({"zero.stage": 3, **changes}), Resources(workers_per_node=4))
        assert plan.memory is not None
        return plan.memory.parameters

    config = small("llama")
    changes: dict[str, Any] = {"model.config": config, "task": "preference", "data.packing": "none"}
    whole = 2 * sum(tensor.numel for tensor in parts_of(make_recipe(changes), config).parameters)
    assert parameters(**changes) - parameters(**changes, preference={"method": "simpo"}) == whole
    asked_before = {"method": "dpo", "precompute_reference": True}
    assert parameters(**changes) - parameters(**changes, preference=asked_before) == whole
    assert parameters(**changes, adapter={"method": "lora"}) < parameters(**changes)
