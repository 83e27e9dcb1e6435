"""Batch inference: what a checkpoint says of each row of a file, the rows shared out to several processes."""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from launcher.data.examples import BadExample, Row
from launcher.data.store import PreparedData
from launcher.errors import DataError, ExpectedError
from launcher.planning.plan import Plan
from launcher.recipe.tasks import TASKS
from launcher.tasks import Task
from launcher.training.offline import load_checkpoint

READERS = {".jsonl": "from_json", ".json": "from_json", ".csv": "from_csv", ".parquet": "from_parquet"}
PREDICTED = ("audio_classification", "image_classification", "seq2seq_lm", "sequence_classification")
"""Tasks whose models say something of a row."""
TRUE = frozenset({"label", "target"})
"""What a row has to learn from, and is not read here."""

_PLACEHOLDER: dict[str, Any] = {"single_label": None, "multi_label": [], "regression": 0.0}


def predict_file(
    folder: Path, plan: Plan, prepared: PreparedData, file: Path, workers: int
) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Let a checkpoint say something of each row of a file.

    Args:
        folder: of the checkpoint.
        plan: of its run.
        prepared: data of the run.
        file: JSON lines, CSV or Parquet with the columns that the run's sources have; a label is not read.
        workers: processes; each holds the whole model.

    Yields:
        Each row, in the file's order, and what the model says of it: `label` and `probabilities`, `labels` and
        `probabilities`, `value`, or `text`; or the `error` why it cannot be used.

    Raises:
        ExpectedError: the task's models say nothing of a row, or it is no such file.
        DataError: the file has not the columns, or cannot be read.
    """
    rows = _read(file, plan)
    parts = [rows[worker::workers] for worker in range(workers) if rows[worker::workers]]
    arguments = [(folder, plan.model_dump_json(), prepared.directory, part) for part in parts]
    if len(parts) <= 1:
        answers = [_answers_of(*each) for each in arguments]
    else:
        # Not forked: a copy of a process with torch's threads in it hangs.
        with ProcessPoolExecutor(len(parts), multiprocessing.get_context("spawn"), _talk_on_stderr) as pool:
            answers = list(pool.map(_answers_of, *zip(*arguments, strict=True)))
    for number, row in enumerate(rows):
        yield row, answers[number % workers][number // workers]


def read_table(file: Path) -> Any:
    """A file as a `datasets.Dataset`.

    Raises:
        ExpectedError: it is of no kind that is read.
        DataError: it cannot be read.
    """
    import datasets

    if file.suffix not in READERS:
        raise ExpectedError(f"{file}: its name ends in none of {', '.join(READERS)}")
    try:
        with TemporaryDirectory() as scratch:
            return getattr(datasets.Dataset, READERS[file.suffix])(str(file), cache_dir=scratch, keep_in_memory=True)
    except Exception as error:  # datasets raises what its readers raise
        raise DataError(f"cannot read {file}: {str(error).strip().splitlines()[0]}") from error


def _talk_on_stderr() -> None:
    """Keep what libraries print off the output: it belongs to the answers."""
    os.dup2(2, 1)


def _read(file: Path, plan: Plan) -> list[Row]:
    """Rows by what the task calls their columns, without labels."""
    recipe = plan.recipe
    if recipe.task not in PREDICTED:
        instead = "; let it write with zerofleet generate" if TASKS[recipe.task].generates else ""
        raise ExpectedError(f"predict is for {' and '.join(PREDICTED)}, but this is a run of {recipe.task}{instead}")
    table = read_table(file)
    encoder = TASKS[recipe.task].load().encoder(recipe)
    source = recipe.data.sources[0]
    names = {"text": source.text_column, **source.columns}
    columns = {}
    for role in (*encoder.roles, *encoder.optional_roles):
        column = names.get(role, role) if names.get(role, role) in table.column_names else role
        if column in table.column_names and role not in TRUE:
            columns[role] = column
        elif role in encoder.roles and role not in TRUE:
            known = ", ".join(table.column_names)
            raise DataError(f"{file} has no column {names.get(role, role)} for the task's {role}; it has {known}")
    return [{role: row[column] for role, column in columns.items()} for row in table]


def _answers_of(folder: Path, plan_json: str, data: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of one process's rows, in order."""
    prepared = PreparedData.load(data)
    plan, task, model = load_checkpoint(folder, Plan.model_validate_json(plan_json), prepared)
    encoded = _encoded(plan, prepared, rows)
    usable = [(number, one) for number, one in enumerate(encoded) if not isinstance(one, BadExample)]
    answers = [{"error": one.reason} if isinstance(one, BadExample) else {} for one in encoded]
    size = plan.batch.micro_batch_size
    for start in range(0, len(usable), size):
        batch = usable[start : start + size]
        for (number, _), answer in zip(batch, _ask(task, model, [one for _, one in batch]), strict=True):
            answers[number] = answer
    return answers


def _encoded(plan: Plan, prepared: PreparedData, rows: Sequence[Row]) -> list[Any]:
    """Examples of rows without labels: the encoder learns the run's classes, and sees the first of them everywhere.

    A text to be written is seen as one letter.
    """
    recipe = plan.recipe
    encoder = TASKS[recipe.task].load().encoder(recipe)
    tokenizer = None
    if TASKS[recipe.task].tokens:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_directory)
    if TASKS[recipe.task].rewrites:
        encoder.begin(tokenizer, [])
        return list(encoder.encode([{**row, "target": "a"} for row in rows])) if rows else []
    labels = prepared.facts["labels"]
    placeholder = _PLACEHOLDER[recipe.classification.problem_type]
    encoder.begin(tokenizer, [[{"label": label if placeholder is None else [label]} for label in labels]])
    label = labels[0] if placeholder is None else placeholder
    ready = [{**row, "label": label} for row in rows]
    for role in {"image", "audio"} & set(encoder.roles):
        ready = [{**row, role: _file(row[role])} for row in ready]
    return list(encoder.encode(ready)) if ready else []


def _file(value: Any) -> Any:
    """A path, as the form of an image or a sound that `datasets` has."""
    return {"bytes": None, "path": value} if isinstance(value, str) else value


@torch.no_grad()
def _ask(task: Task, model: Any, samples: Sequence[Any]) -> list[dict[str, Any]]:
    batch = task.collate(samples)
    predictions = task.loss(model, batch).predictions | task.written(model, batch)
    return task.answers({name: values.float().numpy() for name, values in predictions.items()})
