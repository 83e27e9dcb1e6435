"""Exporting as ONNX: one file that other runtimes run, compared with the model before it is trusted."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from launcher.data.store import PreparedData
from launcher.errors import ExpectedError
from launcher.planning.plan import Plan
from launcher.tasks import Batch, Task
from launcher.training.export import replace_folder, scratch_beside, tokenizer_of
from launcher.training.offline import held_out, restore_scalars, whole_to_export

FILE = "model.onnx"
OUTPUTS = ("logits", "start_logits", "end_logits")
"""What is written of a model's output, as far as it has them."""
TOLERANCE = 1e-3
"""Of the largest difference, relative to the largest value: fp32 sums in another order stay far below."""

_EAGER = ("t5", "mt5", "umt5")
"""Models whose attention by `sdpa` torch cannot convert: it takes the result apart as if it lay in memory otherwise."""


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        inputs: names, in order.
        outputs: names, in order.
        difference: the largest between ONNX Runtime's outputs and the model's, on held-out samples.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    difference: float


class _Plain(nn.Module):
    """A model with tensors in their order as arguments, and named tensors of its output as a tuple."""

    def __init__(
        self, model: nn.Module, inputs: tuple[str, ...], fixed: dict[str, Any], outputs: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.fixed = fixed
        self.outputs = outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The outputs."""
        found = self.model(**dict(zip(self.inputs, tensors, strict=True)), **self.fixed)
        return tuple(found[name] for name in self.outputs)


def export_onnx(folder: Path, plan: Plan, prepared: PreparedData, target: Path) -> Converted:
    """Write a checkpoint as `model.onnx` with its config and tokenizer; an adapter is merged first.

    Samples of any number and length can be fed. A language model is written without a cache of keys and values: it
    reads the whole text for each token.

    Args:
        folder: of a complete checkpoint.
        plan: of the run.
        prepared: its data; two batches of what is held out are compared.
        target: the folder to make.

    Raises:
        ExpectedError: a package is missing, torch cannot convert the model, or the file computes something else.
        DataError: nothing is held out to compare on.
        StorageError: the folder cannot be written.
    """
    require("--onnx")
    held_out(prepared)
    _, task, model = whole_to_export(folder, plan, prepared, "--onnx")
    with scratch_beside(target) as scratch:
        converted = convert_into(scratch / "made", task, model, plan, prepared)
        replace_folder(scratch / "made", target)
    return converted


def require(option: str) -> None:
    """Check that what converts and runs ONNX is installed.

    Raises:
        ExpectedError: it is not.
    """
    try:
        import onnxruntime  # noqa: F401 (runs it)
        import onnxscript  # noqa: F401 (what torch.onnx builds with)
    except ImportError as error:
        raise ExpectedError(f"{option} needs the package {error.name}: pip install 'zerofleet[onnx]'") from error


def open_session(file: Path) -> Any:
    """Let ONNX Runtime run a file on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def convert_into(
    made: Path, task: Task, model: Any, plan: Plan, prepared: PreparedData, *, file: bool = True
) -> Converted:
    """Write `model.onnx`, compared with the model on held-out samples, with config and tokenizer; or the latter alone.

    Raises:
        ExpectedError: torch cannot convert the model, or the file computes something else.
    """
    rows = [dataset[index] for dataset in held_out(prepared) for index in range(min(len(dataset), 8))]
    restore_scalars(model, task)
    made.mkdir()
    model.config.save_pretrained(made)
    tokenizer = tokenizer_of(model, plan, prepared.tokenizer_directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(made)
    traced, other = task.collate(rows[:3] if len(rows) > 2 else rows * 3), task.collate(rows[-1:] * 2)
    inputs, fixed, outputs = _call_of(task, model, traced)
    if not file:
        return Converted(tuple(inputs), tuple(outputs), 0.0)
    plain = _Plain(model, tuple(inputs), fixed, tuple(outputs)).eval()
    _convert(plain, tuple(inputs.values()), made / FILE)
    session = open_session(made / FILE)
    difference = max(_difference(session, plain, _call_of(task, model, batch)[0]) for batch in (traced, other))
    if not difference <= TOLERANCE:
        raise ExpectedError(
            f"--onnx: the converted {model.config.model_type} computes something else: its outputs are "
            f"{difference:.1e} from the model's, relative to the largest"
        )
    return Converted(tuple(inputs), tuple(outputs), difference)


def _call_of(task: Task, model: nn.Module, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """How the task calls the model: tensors by name, other arguments, and what comes out.

    Raises:
        ExpectedError: nothing comes out that is known.
    """
    calls: list[tuple[dict[str, Any], Any]] = []
    hook = model.register_forward_hook(lambda _, args, kwargs, out: calls.append((kwargs, out)), with_kwargs=True)
    with torch.no_grad():
        task.loss(model, batch)
    hook.remove()
    arguments, output = calls[0]
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in arguments.items() if name not in tensors}
    found = {name: output[name] for name in OUTPUTS if isinstance(output.get(name), Tensor)}
    if not found:
        raise ExpectedError(
            f"--onnx: a model of this task gives none of {', '.join(OUTPUTS)}, which are what is written"
        )
    return tensors, fixed, found


def _convert(plain: _Plain, tensors: tuple[Tensor, ...], file: Path) -> None:
    """Write the file; every sample count, and every length of text or sound, can be fed.

    Raises:
        ExpectedError: torch cannot convert it.
    """
    any_size = torch.export.Dim.DYNAMIC
    pictures = [name == "pixel_values" for name in plain.inputs]
    shapes = tuple(
        {0: any_size} if picture else dict.fromkeys(range(tensor.ndim), any_size)
        for tensor, picture in zip(tensors, pictures, strict=True)
    )
    options: dict[str, Any] = {"input_names": list(plain.inputs), "output_names": list(plain.outputs)}
    model: Any = plain.model
    if model.config.model_type in _EAGER:
        model.set_attn_implementation("eager")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and onnxscript, about each other
            torch.onnx.export(
                plain, tensors, str(file), dynamic_shapes=(shapes,), dynamo=True, verbose=False, **options
            )
    except Exception as error:  # whatever torch's tracer and converter raise
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExpectedError(f"--onnx: torch {torch.__version__} cannot convert the model: {text}"
                            ) from error  # fmt: skip


def _difference(session: Any, plain: _Plain, tensors: dict[str, Tensor]) -> float:
    """The largest difference on a batch, relative to the largest value."""
    with torch.no_grad():
        expected = plain(*tensors.values())
    found = session.run(list(plain.outputs), {name: tensor.numpy() for name, tensor in tensors.items()})
    return max(
        float(np.abs(one - other.numpy()).max() / max(float(other.abs().max()), 1e-6))
        for one, other in zip(found, expected, strict=True)
    )
