"""Exporting as ONNX with matrices in 8 bits, measured before and after."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from launcher.data.store import PreparedData
from launcher.errors import ExpectedError
from launcher.planning.plan import Plan
from launcher.training.export import replace_folder, scratch_beside
from launcher.training.offline import figures_alone, held_out, whole_to_export
from launcher.training.onnx_export import FILE, convert_into, open_session, require


@dataclass(frozen=True)
class Quantized:
    """What quantising did.

    Attributes:
        products: matrix products that are computed in 8 bits now.
        bytes_before: of `model.onnx` without it.
        bytes_after: with it.
        before: loss and metrics by name, on the held-out data, of the model.
        after: the same of the written file, run by ONNX Runtime.
    """

    products: int
    bytes_before: int
    bytes_after: int
    before: Mapping[str, float]
    after: Mapping[str, float]


class _Session(nn.Module):
    """A file that ONNX Runtime runs, in the place of a model."""

    def __init__(self, session: Any, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.get_output_embeddings = model.get_output_embeddings
        self.number_format = nn.Parameter(torch.zeros(1))  # tasks ask a model's parameters for it
        self._session = session
        self._inputs = [each.name for each in session.get_inputs()]
        self._outputs = [each.name for each in session.get_outputs()]

    def forward(self, **inputs: Any) -> Any:
        """What the file gives, by name."""
        found = self._session.run(self._outputs, {name: inputs[name].numpy() for name in self._inputs})
        return SimpleNamespace(**{name: torch.from_numpy(one) for name, one in zip(self._outputs, found, strict=True)})


def export_quantized(
    folder: Path, plan: Plan, prepared: PreparedData, target: Path, max_samples: int | None = None
) -> Quantized:
    """Write a checkpoint as `model.onnx` whose matrix products are in 8 bits, as `export_onnx` does without.

    A weight has one scale; activations get theirs when they are there (dynamic quantisation, by ONNX Runtime).

    Args:
        folder: of a complete checkpoint.
        plan: of the run.
        prepared: its data.
        target: the folder to make.
        max_samples: measure on so many held-out samples at most.

    Raises:
        ExpectedError: a package is missing, the model cannot be converted, or has no matrix product.
        DataError: nothing is held out to measure on.
        StorageError: the folder cannot be written.
    """
    require("--quantize")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    held_out(prepared)
    alone, task, model = whole_to_export(folder, plan, prepared, "--quantize")
    if task.writes:
        raise ExpectedError("--quantize is not for models that write texts in evaluations (seq2seq.metrics)")
    before = figures_alone(alone, task, model, prepared, max_samples)
    with scratch_beside(target) as scratch:
        made, whole = scratch / "made", scratch / "whole"
        convert_into(whole, task, model, plan, prepared)
        convert_into(made, task, model, plan, prepared, file=False)
        quantize_dynamic(
            whole / FILE, made / FILE, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Gemm"]
        )
        nodes = onnx.load(str(made / FILE), load_external_data=False).graph.node
        products = sum(1 for node in nodes if node.op_type == "MatMulInteger")
        if not products:
            raise ExpectedError("--quantize: the model has no matrix product to quantise; use --prune or --dtype bf16")
        session: Any = _Session(open_session(made / FILE), model)
        after = figures_alone(alone, task, session, prepared, max_samples)
        sizes = _size(whole), _size(made)
        replace_folder(made, target)
    return Quantized(products, *sizes, before, after)


def _size(folder: Path) -> int:
    """Bytes of the file, and of the weights beside it."""
    return sum(file.stat().st_size for file in folder.glob(f"{FILE}*"))
