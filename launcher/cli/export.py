"""`zerofleet export`: turn a run's checkpoint into a folder for others, smaller or for another runtime if wanted."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli.one_checkpoint import data_of, one_checkpoint, quietly

if TYPE_CHECKING:
    from launcher.planning.plan import Plan


def export(
    run_dir: Annotated[Path, typer.Argument(help="Run directory.")],
    step: Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write. Default: RUN/export.")] = None,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: the recipe's.")] = None,
    prune: Annotated[
        float | None, typer.Option(min=0, max=1, help="Set this share of the layers' weights, the smallest, to zero.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int8: linear layers compute in 8 bits (needs zerofleet[quantize]).")
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write model.onnx, compared with the model (needs zerofleet[onnx]).")
    ] = False,
    max_samples: Annotated[
        int | None, typer.Option(min=1, help="With --prune and --quantize: measure on so many held-out samples.")
    ] = None,
    ema: Annotated[bool | None, typer.Option(help="The averaged weights, or not. Default: the recipe's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a run's checkpoint as a Hugging Face folder that `from_pretrained` loads."""
    _check(dtype, prune, quantize, onnx, max_samples)
    directory, plan, folder = one_checkpoint(run_dir, step, ema)
    if dtype is not None:
        section = plan.recipe.export.model_copy(update={"dtype": dtype})
        plan = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"export": section})})
    target = (output or directory.export).absolute()
    with quietly():
        from launcher.checkpoints.folders import step_of

        found = _write(folder, plan, target, data_of(directory), prune, quantize, onnx, max_samples)
    if as_json:
        print(json.dumps({"step": step_of(folder), "export": str(target), **found}))
        return
    print(f"step {step_of(folder)} -> {target}")
    _print(found)


def _check(dtype: str | None, prune: float | None, quantize: str | None, onnx: bool, max_samples: int | None) -> None:
    """Refuse options that are unknown, or not together."""
    from launcher.errors import ExpectedError

    if dtype not in (None, "fp32", "bf16", "fp16"):
        raise ExpectedError(f"--dtype {dtype}: use fp32, bf16 or fp16")
    if quantize not in (None, "int8"):
        raise ExpectedError(f"--quantize {quantize}: use int8")
    wanted = [f"--{name}" for name, value in (("prune", prune), ("quantize", quantize)) if value is not None]
    wanted += ["--onnx"] if onnx else []
    if len(wanted) > 1:
        raise ExpectedError(
            f"{' and '.join(wanted)} do not go together: export one after the other, each to an --output"
        )
    if max_samples is not None and (onnx or not wanted):
        raise ExpectedError("--max-samples says on how much is measured, and only --prune and --quantize measure")
    if onnx and dtype not in (None, "fp32"):
        raise ExpectedError(f"--dtype {dtype}: model.onnx is written in fp32; leave --dtype out")


def _write(
    folder: Path, plan: "Plan", target: Path, prepared: Any, prune: float | None, quantize: str | None, onnx: bool,
    max_samples: int | None,
) -> dict[str, Any]:  # fmt: skip
    """Write what is wanted; returns what was measured of it, by name."""
    if prune is not None:
        from launcher.training.pruning import export_pruned

        return {"pruned": asdict(export_pruned(folder, plan, prepared, target, prune, max_samples))}
    if quantize is not None:
        from launcher.training.quantizing import export_quantized

        return {"quantized": asdict(export_quantized(folder, plan, prepared, target, max_samples))}
    if onnx:
        from launcher.training.onnx_export import export_onnx

        return {"onnx": asdict(export_onnx(folder, plan, prepared, target))}
    from launcher.training.export import export_checkpoint

    export_checkpoint(folder, plan, prepared.tokenizer_directory, target)
    return {}


def _print(found: Mapping[str, Any]) -> None:
    """What was measured, for people."""
    for kind, facts in found.items():
        if kind == "pruned":
            print(f"{facts['zeros']:,} of {facts['weights']:,} weights of its layers are zero")
        elif kind == "quantized":
            print(f"{facts['layers']} layers in 8 bits, {facts['bytes_before']:,} -> {facts['bytes_after']:,} bytes; "
                  "from_pretrained loads it where torchao is installed")  # fmt: skip
        else:
            outputs = ", ".join(facts["outputs"])
            print(f"model.onnx: {', '.join(facts['inputs'])} -> {outputs}, {facts['difference']:.1e} from the model's")
        for name, value in facts.get("before", {}).items():
            print(f"  {name.replace('_', ' '):<28}{value:.4f} -> {facts['after'][name]:.4f}")
