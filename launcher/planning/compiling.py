"""What `training.torch_compile` goes with, and which kernels a plan asks for."""

from collections.abc import Mapping
from typing import Any

from launcher.errors import Problem
from launcher.planning.combinations import kinds
from launcher.planning.layout import Layout
from launcher.recipe.schema import Recipe, reads_packed_text

COMPILED_FAMILIES = frozenset({"llama", "qwen3", "mistral"})
"""Families that a test of ours has trained compiled."""

_STAGES = frozenset({0, 1, 2})


def compile_problems(config: Mapping[str, Any], layout: Layout, zero_stage: int, recipe: Recipe) -> list[Problem]:
    """Say why a recipe's model is not compiled; empty when it is, or need not be."""
    if not recipe.training.torch_compile:
        return []
    problems = []
    if config.get("model_type") not in COMPILED_FAMILIES:
        family, families = config.get("model_type", "a model on the hub"), ", ".join(sorted(COMPILED_FAMILIES))
        problems.append(f"is not proved for {family}; leave it out, or train one of {families}")
    if kinds(layout):
        problems.append("is proved for data parallelism alone; leave it out, or leave parallel out")
    if zero_stage not in _STAGES:
        problems.append(
            f"does not go with ZeRO stage {zero_stage}, whose hooks gather each module's weights in the middle of what "
            "is compiled (runtime/zero/parameter_offload.py); set zero.stage to 2, or leave it out"
        )
    if recipe.training.mlp_tiles > 1 or recipe.training.loss_tiles > 1:
        problems.append("does not go with mlp_tiles and loss_tiles, which compute again by hand; leave one of them out")
    if not reads_packed_text(recipe) or recipe.adapter is not None or recipe.training.adversarial is not None:
        problems.append("is proved for causal_lm from plain text, all of the model trained; leave it out")
    return [Problem(message, "training.torch_compile") for message in problems]
