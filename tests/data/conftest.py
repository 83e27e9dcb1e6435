"""Real text (some of the standard library's own source) and recipes over it."""

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.recipe.schema import Recipe

MODULES = ("abc", "ast", "bisect", "calendar", "cmd", "copy", "csv", "dis", "enum", "fractions", "glob", "heapq", "io")
"""Large and small ones; 13 files, about 350 kB."""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Python source files, old enough for their hashes to be remembered."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in MODULES:
        shutil.copy2(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", folder)
    return folder


MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def make_recipe(tmp_path: Path, corpus: Path) -> MakeRecipe:
    """Make a recipe over the corpus, with a cache of the test's own; keywords replace parts of `data`."""

    def make(*, tokenizer: dict[str, Any] | None = None, seed: int = 42, **data: Any) -> Recipe:
        defaults = {
            "sources": [{"type": "text", "files": [f"{corpus}/*.py"]}],
            "sequence_length": 64,
            "cache_directory": str(tmp_path / "cache"),
            "preprocessing_num_workers": 2,
        }
        return Recipe.model_validate(
            {
                "name": "test",
                "seed": seed,
                "model": {"config": {"model_type": "llama"}},
                "tokenizer": tokenizer or {"train": {"vocab_size": 400}},
                "data": {**defaults, **data},
                "training": {"max_steps": 1},
            }
        )

    return make
