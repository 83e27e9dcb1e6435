"""Which parameters an adapter adds and which are frozen is what peft and `launcher.models.adapters` make of a model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import AutoConfig, AutoModelForCausalLM

from launcher.models.adapters import add_adapter, freeze
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.planning.trained import _PEFT_TARGETS, parts_of
from launcher.recipe.schema import Recipe
from tests.support.small_models import small

MakeRecipe = Callable[..., Recipe]

ADAPTERS = {
    "llama": {"method": "lora", "r": 4},
    "qwen3": {"method": "dora", "r": 3, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "gemma2": {"method": "rslora"},
    "gpt2": {"method": "lora", "target_modules": ["c_attn", "mlp.c_proj"]},
    "gpt_neox": {"method": "lora"},
}


def test_peft_chooses_the_modules_that_the_plan_says() -> None:
    for family, targets in _PEFT_TARGETS.items():
        assert tuple(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[family]) == targets


def model_of(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("family", ADAPTERS)
def test_an_adapters_parameters(family: str, make_recipe: MakeRecipe) -> None:
    config = small(family)
    recipe = make_recipe({"model.config": config, "adapter": ADAPTERS[family]})
    parts = parts_of(recipe, config)
    assert recipe.adapter is not None
    adapted = add_adapter(model_of(config), recipe.adapter, "CAUSAL_LM", seed=1)
    real = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".default", ""): parameter
        for name, parameter in adapted.named_parameters()
    }
    assert {tensor.name: tensor.shape for tensor in parts.parameters} == {n: tuple(p.shape) for n, p in real.items()}
    assert parts.frozen == {name for name, parameter in real.items() if not parameter.requires_grad}


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
        ({"method": "ia3"}, "ia3 is not counted; lora, rslora and dora are"),
        ({"method": "adalora"}, "adalora is not counted; lora, rslora and dora are"),
        ({"method": "lora", "modules_to_save": ["lm_head"]}, "modules_to_save are held twice"),
        ({"method": "lora", "target_modules": ["embed_tokens"]}, "embed_tokens lies outside of the layers"),
    ],
)
def test_other_adapters_are_not_counted(make_recipe: MakeRecipe, adapter: dict[str, Any], reason: str) -> None:
    plan = make_plan(make_recipe({"adapter": adapter}), Resources())
    assert plan.memory is None
    assert f"memory is not counted: {reason}" in plan.notes


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
