"""Exporting with linear layers that compute in 8 bits, measured before and after."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launcher.data.store import PreparedData
from launcher.errors import ExpectedError
from launcher.models.build import DTYPES
from launcher.planning.plan import Plan
from launcher.training.export import scratch_beside, tokenizer_of, write_folder
from launcher.training.offline import figures_alone, held_out, restore_scalars, whole_to_export


@dataclass(frozen=True)
class Quantized:
    """What quantising did.

    Attributes:
        layers: that compute in 8 bits now.
        bytes_before: of the weights' files without it.
        bytes_after: with it.
        before: loss and metrics by name, on the held-out data.
        after: the same of the written folder, loaded again.
    """

    layers: int
    bytes_before: int
    bytes_after: int
    before: Mapping[str, float]
    after: Mapping[str, float]


def export_quantized(
    folder: Path, plan: Plan, prepared: PreparedData, target: Path, max_samples: int | None = None
) -> Quantized:
    """Write a checkpoint as a Hugging Face folder whose linear layers have 8-bit weights; an adapter is merged first.

    Each row of a weight has a scale; each token's activations get one when they are there (dynamic quantisation, as in
    LLM.int8, arXiv 2208.07339, without its outliers). The head that shares the embeddings' weights, and the head of a
    language model, stay as they are. `from_pretrained` loads the folder where torchao is installed.

    Args:
        folder: of a complete checkpoint.
        plan: of the run.
        prepared: its data.
        target: the folder to make.
        max_samples: measure on so many held-out samples at most.

    Raises:
        ExpectedError: torchao is not installed, the adapter is a prompt, or no layer is linear.
        DataError: nothing is held out to measure on.
        StorageError: the folder cannot be written.
    """
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    except ImportError as error:
        raise ExpectedError("--quantize needs the package torchao: pip install 'zerofleet[quantize]'") from error
    from transformers import TorchAoConfig

    held_out(prepared)
    alone, task, model = whole_to_export(folder, plan, prepared, "--quantize")
    before = figures_alone(alone, task, model, prepared, max_samples)
    model.config.use_cache = True
    restore_scalars(model, task)
    dtype = DTYPES[plan.recipe.export.dtype or plan.recipe.training.precision]
    with scratch_beside(target) as scratch:
        whole = scratch / "whole"
        write_folder(model.to(dtype), whole)
        settings = TorchAoConfig(Int8DynamicActivationInt8WeightConfig())
        small = task.auto_class.from_pretrained(whole, quantization_config=settings, dtype=dtype)
        layers = sum(1 for layer in small.modules() if isinstance(layer, nn.Linear) and _is_quantized(layer.weight))
        if not layers:
            raise ExpectedError("--quantize: the model has no linear layer to quantise; use --prune or --dtype bf16")
        write_folder(small, target, tokenizer_of(small, plan, prepared.tokenizer_directory))
        bytes_before = _size(whole)
    again = task.auto_class.from_pretrained(target, dtype=dtype).eval()
    after = figures_alone(alone, task, again, prepared, max_samples)
    return Quantized(layers, bytes_before, _size(target), before, after)


def _is_quantized(weight: torch.Tensor) -> bool:
    """Whether a weight is of one of torchao's own classes."""
    kind: Any = type(weight.data if type(weight) is nn.Parameter else weight)
    return str(kind.__module__).startswith("torchao")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
