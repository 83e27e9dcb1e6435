"""Exporting with the smallest weights set to zero, measured before and after."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

from launcher.data.store import PreparedData
from launcher.models.build import DTYPES
from launcher.planning.plan import Plan
from launcher.training.export import tokenizer_of, write_folder
from launcher.training.offline import figures_alone, held_out, restore_scalars, whole_to_export


@dataclass(frozen=True)
class Pruned:
    """What pruning did.

    Attributes:
        zeros: weights that are zero now.
        weights: of the layers that were pruned.
        before: loss and metrics by name, on the held-out data.
        after: the same of the pruned model.
    """

    zeros: int
    weights: int
    before: Mapping[str, float]
    after: Mapping[str, float]


def prune_smallest(model: nn.Module, share: float) -> tuple[int, int]:
    """Set the smallest weights of all linear and convolutional layers together to zero (Han et al., arXiv 1506.02626).

    Weights that embeddings share with the head are left as they are.

    Returns:
        How many weights are zero in those layers now, and how many there are.
    """
    embeddings = {id(layer._parameters["weight"]) for layer in model.modules() if isinstance(layer, nn.Embedding)}
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) or type(layer).__name__ == "Conv1D"
    ]
    # Of a layer under weight norm the weight is made anew whenever it is asked for.
    own = [layer for layer in layers if "weight" in layer._parameters]
    chosen = [(layer, "weight") for layer in own if id(layer.weight) not in embeddings]
    prune.global_unstructured(chosen, prune.L1Unstructured, amount=share)
    for layer, name in chosen:
        prune.remove(layer, name)  # type: ignore[no-untyped-call]  # torch does not declare it
    weights: list[torch.Tensor] = [layer.weight for layer, _ in chosen]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


def export_pruned(
    folder: Path, plan: Plan, prepared: PreparedData, target: Path, share: float, max_samples: int | None = None
) -> Pruned:
    """Write a checkpoint as a Hugging Face folder with a share of its weights set to zero; an adapter is merged first.

    Args:
        folder: of a complete checkpoint.
        plan: of the run.
        prepared: its data.
        target: the folder to make.
        share: of the weights that become zero, 0 to 1.
        max_samples: measure on so many held-out samples at most.

    Raises:
        ExpectedError: the adapter is a prompt.
        DataError: nothing is held out to measure on.
        StorageError: the folder cannot be written.
    """
    held_out(prepared)
    alone, task, model = whole_to_export(folder, plan, prepared, "--prune")
    before = figures_alone(alone, task, model, prepared, max_samples)
    with torch.no_grad():
        zeros, weights = prune_smallest(model, share)
    after = figures_alone(alone, task, model, prepared, max_samples)
    model.config.use_cache = True
    dtype = DTYPES[plan.recipe.export.dtype or plan.recipe.training.precision]
    restore_scalars(model, task)
    write_folder(model.to(dtype), target, tokenizer_of(model, plan, prepared.tokenizer_directory))
    return Pruned(zeros, weights, before, after)
