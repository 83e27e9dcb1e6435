"""Recipes of the task tests: a real small data set each, and a run directory for it."""

import json
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launcher.data.prepare import prepare
from launcher.data.store import PreparedData
from launcher.planning.layout import Resources
from launcher.planning.plan import Plan, make_plan
from launcher.recipe.loading import load_recipe
from launcher.run_directory import RunDirectory
from launcher.submit import write_run

STDLIB = sysconfig.get_path("stdlib")
BERT = (
    "{model_type: bert, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    "max_position_embeddings: 128, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
)

RunOf = Callable[..., tuple[RunDirectory, Plan, PreparedData]]


def write_recipe(folder: Path, task: str, model: str, sources: list[dict[str, Any]], **sections: Any) -> Path:
    """A recipe file for two workers under ZeRO 2 in fp32; `sections` are laid over the defaults, one level deep."""
    content: dict[str, Any] = {
        "name": task.replace("_", "-"),
        "task": task,
        "seed": 5,
        "data": {
            "sources": sources,
            "validation_fraction": 0.2,
            "cache_directory": str(folder / "cache"),
            "preprocessing_num_workers": 1,
        },
        "training": {"max_steps": 2, "micro_batch_size": 4, "precision": "fp32", "learning_rate": 3e-3},
        "zero": {"stage": 2},
        "logging": {"logging_steps": 1, "tensorboard": False},
        "export": {"at_end": False},
    }
    for name, values in sections.items():
        content[name] = {**content[name], **values} if isinstance(content.get(name), dict) else values
    path = folder / "recipe.yaml"
    body = "\n".join(f"{name}: {json.dumps(value)}" for name, value in content.items())
    path.write_text(f"{body}\nmodel: {model}\n")
    return path


def run_of(recipe: Path, folder: Path, *overrides: str, workers: int = 2) -> tuple[RunDirectory, Plan, PreparedData]:
    """Prepare a recipe's data and write a run directory."""
    loaded = load_recipe(recipe, overrides)
    prepared = prepare(loaded, progress=False)
    plan = make_plan(loaded, Resources(nodes=1, workers_per_node=workers))
    directory = RunDirectory.at(folder)
    write_run(directory, plan)
    return directory, plan, prepared
