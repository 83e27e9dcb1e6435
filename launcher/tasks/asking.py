"""Asking a model outside of a run, in one process: its weights, where it computes, how many samples at once."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from launcher.data.cache import cache_directory
from launcher.data.files import index_path, scan_files
from launcher.errors import ModelError
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe

WEIGHTS = ("config.json", "*.safetensors", "*.bin", "*.index.json")
DEFAULT_SAMPLES_AT_ONCE = 8
LOOKED_AT = 64


def weights_identity(name_or_path: str, recipe: Recipe) -> list[Any]:
    """What decides a pretrained model's weights: the digests of a folder's files, or the commit of a hub name.

    Raises:
        ModelError: there is no such folder, and no such name on the hub.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        from transformers.utils import cached_file

        try:
            config = cached_file(name_or_path, "config.json")
        except (OSError, ValueError) as error:
            raise ModelError(f"{name_or_path} is no folder here, and cannot be had from the hub: {error}") from error
        return ["hub", name_or_path, Path(str(config)).parent.name]
    paths = sorted({str(path.absolute()) for pattern in WEIGHTS for path in folder.glob(pattern)})
    facts, problems = scan_files(paths, index_path(cache_directory(recipe), [str(folder.absolute())], []))
    if problems:
        raise ModelError("; ".join(problems))
    return ["folder", [[Path(fact.path).name, fact.digest] for fact in facts]]


def model_identity(plan: Plan) -> list[Any]:
    """What decides the weights that training begins with."""
    recipe = plan.recipe
    if recipe.model.model_name_or_path is not None:
        return weights_identity(recipe.model.model_name_or_path, recipe)
    return ["config", plan.transformers_config, recipe.seed]


def asked_device() -> torch.device:
    """A GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def samples_at_once(recipe: Recipe) -> int:
    """As many as a worker takes in one pass."""
    return recipe.training.micro_batch_size or DEFAULT_SAMPLES_AT_ONCE


def tokens_of(dataset: Sequence[Any]) -> int:
    """Tokens of all samples, about: told from some of them, evenly spread."""
    rows = range(0, len(dataset), max(1, len(dataset) // LOOKED_AT))
    lengths = [len(dataset[row]["input_ids"]) for row in rows]
    return round(sum(lengths) / max(1, len(lengths)) * len(dataset))


def in_batches(rows: range, size: int) -> Iterator[range]:
    """Some rows, so many at a time."""
    for first in range(rows.start, rows.stop, size):
        yield range(first, min(first + size, rows.stop))
