"""What MLPs and losses in parts of the sequence go with."""

from collections.abc import Mapping
from typing import Any

from launcher.errors import Problem
from launcher.planning.combinations import kinds
from launcher.planning.families import FAMILIES, resolve
from launcher.planning.layout import Layout
from launcher.recipe.schema import Recipe, reads_packed_text

TILED_FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma"})
"""Families that a test of ours has trained in parts."""


def tiling_problems(config: Mapping[str, Any], layout: Layout, zero_stage: int, recipe: Recipe) -> list[Problem]:
    """Say why a recipe's MLPs or loss are not computed in parts; empty when they are, or need not be."""
    training = recipe.training
    asked = [name for name in ("mlp_tiles", "loss_tiles") if getattr(training, name) > 1]
    problems = []
    for name in asked:
        size, length = getattr(training, name), recipe.data.sequence_length // layout.sequence_parallel_size
        if config.get("model_type") not in TILED_FAMILIES:
            family, families = config.get("model_type", "a model on the hub"), ", ".join(sorted(TILED_FAMILIES))
            message = f"is not proved for {family}; leave it out, or train one of {families}"
            problems.append((name, message))
        if not kinds(layout) <= {"sequence"}:
            problems.append((name, "goes with data and sequence parallelism only; leave it out"))
        extended = recipe.adapter is not None or recipe.distillation is not None
        if not reads_packed_text(recipe) or extended or recipe.training.adversarial is not None:
            problems.append((name, "is for causal_lm from plain text, all of the model trained; leave it out"))
        if size > length:
            problems.append((name, f"is {size}, more than a rank's {length} positions; set it to at most {length}"))
    if "loss_tiles" in asked and zero_stage > 1 and _is_tied(config):
        message = (
            f"does not go with tied embeddings under ZeRO stage {zero_stage}, which reduces their gradient twice: the "
            "head's part of it and the embeddings' (runtime/sequence_parallel/ulysses_sp.py: SequenceTiledCompute); "
            "set zero.stage to 1, or leave it out"
        )
        problems.append(("loss_tiles", message))
    return [Problem(message, f"training.{name}") for name, message in problems]


def _is_tied(config: Mapping[str, Any]) -> bool:
    family = FAMILIES.get(config.get("model_type", ""))
    return family is not None and bool(resolve(family, config)["tie_word_embeddings"])
