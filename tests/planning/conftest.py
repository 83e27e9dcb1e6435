from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from launcher.recipe.schema import Recipe

MINIMAL: dict[str, Any] = {
    "name": "small",
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 64,
            "intermediate_size": 170,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    },
    "tokenizer": {"train": {"vocab_size": 1000}},
    "data": {"sources": [{"type": "text", "files": ["corpus.txt"]}], "sequence_length": 32},
    "training": {"max_steps": 10, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
}


def _laid_over(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for path, value in changes.items():
        *sections, leaf = path.split(".")
        place = base
        for section in sections:
            place = place.setdefault(section, {})
        if value is None:
            place.pop(leaf, None)
        else:
            place[leaf] = value
    return base


@pytest.fixture(scope="session")
def make_recipe() -> Callable[..., Recipe]:
    """Make the minimal recipe with some fields changed by dotted path; None removes a field."""

    def make(changes: dict[str, Any] | None = None) -> Recipe:
        return Recipe.model_validate(_laid_over(deepcopy(MINIMAL), changes or {}))

    return make
