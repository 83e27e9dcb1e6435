"""`zerofleet evaluate`, `zerofleet predict` and `zerofleet generate`: what a checkpoint of a run can do."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli.one_checkpoint import data_of, one_checkpoint, quietly

Run = Annotated[Path, typer.Argument(help="Run directory.")]
Step = Annotated[int | None, typer.Option(help="Step of the checkpoint. Default: the newest.")]


def evaluate(
    run_dir: Run,
    step: Step = None,
    max_samples: Annotated[
        int | None, typer.Option(min=1, help="At most so many held-out samples, or questions. Default: all.")
    ] = None,
    ema: Annotated[bool | None, typer.Option(help="The averaged weights, or not. Default: the recipe's.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Ask a language model about labelled texts instead, as this YAML file says.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a run's checkpoint on all of its held-out data, in this process."""
    if prompts is not None:
        _ask(run_dir, step, ema, prompts, max_samples, as_json)
        return
    with quietly():
        from launcher.training.offline import evaluate_checkpoint

        directory, plan, folder = one_checkpoint(run_dir, step, ema)
        evaluation, metrics = evaluate_checkpoint(folder, plan, data_of(directory), max_samples)
    values = {"loss": evaluation.loss, **metrics.values}
    if as_json:
        facts = {"checkpoint": str(folder), "targets": evaluation.num_targets, "metrics": values}
        print(json.dumps({**facts, "report": metrics.report}, indent=2))
        return
    print(f"{folder}: {evaluation.num_targets:,} targets")
    for name, value in values.items():
        print(f"  {name.replace('_', ' '):<28}{value:.4f}")
    if metrics.text:
        print(metrics.text)


def _ask(
    run_dir: Path, step: int | None, ema: bool | None, prompts: Path, max_samples: int | None, as_json: bool
) -> None:
    """Print what the model said before training and at the checkpoint, side by side."""
    with quietly():
        from launcher.training.prompting import ask, read_prompts

        section = read_prompts(prompts)
        directory, plan, folder = one_checkpoint(run_dir, step, ema)
        asked = ask(folder, plan, data_of(directory), section, max_samples)
    if as_json:
        print(json.dumps({"checkpoint": str(folder), **asdict(asked)}, indent=2))
        return
    print(f"{folder}: {asked.examples:,} questions\n  {'':<28}before   after")
    for name, value in asked.before.items():
        print(f"  {name.replace('_', ' '):<28}{value:.4f}   {asked.after[name]:.4f}")


def predict(
    run_dir: Run,
    file: Annotated[Path, typer.Argument(help="Rows to predict: JSON lines, CSV or Parquet, with the data's columns.")],
    output: Annotated[Path | None, typer.Option(help="File of JSON lines to write. Default: the output.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the rows.")] = 1,
    step: Step = None,
) -> None:
    """Let a run's checkpoint say something of each row of a file: a class, a number, or a text."""
    with quietly():
        from launcher.errors import StorageError
        from launcher.run_directory import write_atomically
        from launcher.training.prediction import predict_file

        directory, plan, folder = one_checkpoint(run_dir, step)
        found = list(predict_file(folder, plan, data_of(directory), file, workers))
    lines = "".join(json.dumps({**_of_json(row), **answer}) + "\n" for row, answer in found)
    if output is None:
        print(lines, end="")
        return
    try:
        write_atomically(output, lines)
    except OSError as error:
        raise StorageError(f"cannot write {output}: {error}") from error
    print(f"{len(found):,} rows -> {output}")


def _of_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without what JSON does not know, such as a picture's bytes."""
    return {name: value for name, value in row.items() if isinstance(value, str | int | float | None)}


def generate(
    run_dir: Run,
    prompts: Annotated[list[str] | None, typer.Argument(help="Texts to continue. Default: lines of the input.")] = None,
    step: Step = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0: always the most probable token; else sample.")] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
) -> None:
    """Let a run's checkpoint continue texts (or rewrite them): those named, or each line of standard input."""
    with quietly():
        from launcher.training.offline import continuations

        directory, plan, folder = one_checkpoint(run_dir, step)
        results = continuations(folder, plan, data_of(directory), prompts or _lines(), max_new_tokens, temperature)
    while True:
        with quietly():
            result = next(results, None)
        if result is None:
            return
        prompt, text = result
        print(json.dumps({"prompt": prompt, "text": text}) if as_json else f"{prompt}{text}", flush=True)


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")
