"""Batch inference: what the exported model says, row by row, on any number of processes."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from launcher.checkpoints import folders
from launcher.data.store import PreparedData
from launcher.errors import DataError, ExpectedError
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory
from launcher.training.export import export_checkpoint
from launcher.training.prediction import predict_file
from tests.support.ranks import Ranks
from tests.training.task_runs import BERT, STDLIB, run_of, write_recipe

Made = tuple[RunDirectory, Plan, PreparedData]
TEXTS = ["import asyncio", "", "def test_it(self):", "msg = email.message_from_string(s)", "await loop.sock_recv()"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, two_ranks: Ranks) -> Made:
    folder = tmp_path_factory.mktemp("predicted")
    source = {"type": "text", "files": [f"{STDLIB}/json/*.py", f"{STDLIB}/email/*.py", f"{STDLIB}/asyncio/*.py"],
              "sample_by": "paragraph", "label_from_folder": True}  # fmt: skip
    recipe = write_recipe(
        folder, "sequence_classification", f"{{config: {BERT}}}", [source], data={"sequence_length": 32},
        tokenizer={"train": {"vocab_size": 400}}, training={"max_steps": 6, "learning_rate": 1e-2},
    )  # fmt: skip
    directory, plan, prepared = run_of(recipe, folder / "run")
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    (directory.path / "data.json").write_text(json.dumps({"directory": str(prepared.directory)}))
    return directory, plan, prepared


def rows_file(folder: Path, column: str = "text") -> Path:
    file = folder / "rows.csv"
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows([[column, "number"], *([text, index] for index, text in enumerate(TEXTS))])
    return file


def exported(run: Made, folder: Path) -> list[dict[str, float] | None]:
    """Probabilities of each text by plain transformers on the exported folder."""
    directory, plan, prepared = run
    checkpoint = folders.complete(directory.checkpoints)[-1]
    target = export_checkpoint(checkpoint, plan, prepared.tokenizer_directory, folder / "export")
    model = AutoModelForSequenceClassification.from_pretrained(target).eval()
    tokenizer = AutoTokenizer.from_pretrained(target)
    found: list[dict[str, float] | None] = []
    for text in TEXTS:
        with torch.no_grad():
            logits = model(**tokenizer(text, return_tensors="pt", truncation=True, max_length=32)).logits
        names = [model.config.id2label[number] for number in range(3)]
        found.append(dict(zip(names, logits[0].softmax(0).tolist(), strict=True)) if text else None)
    return found


@pytest.mark.distributed
def test_predictions_are_those_of_the_exported_model(run: Made, tmp_path: Path) -> None:
    expected = exported(run, tmp_path)
    output = tmp_path / "answers.jsonl"
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main", "predict", str(run[0].path), str(rows_file(tmp_path)),
         "--workers", "2", "--output", str(output)],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"5 rows -> {output}\n"
    answers: list[dict[str, Any]] = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["text"] or "" for answer in answers] == TEXTS
    for answer, probabilities in zip(answers, expected, strict=True):
        if probabilities is None:
            assert answer["error"] == "its text is empty"
        else:
            assert answer["probabilities"] == pytest.approx(probabilities, abs=1e-5)
            assert answer["label"] == max(probabilities, key=probabilities.__getitem__)


@pytest.mark.distributed
def test_files_that_cannot_be_predicted_are_refused(run: Made, tmp_path: Path, make_run: Any) -> None:
    directory, plan, prepared = run
    folder = folders.complete(directory.checkpoints)[-1]
    with pytest.raises(DataError, match=r"has no column text for the task's text; it has body, number"):
        next(predict_file(folder, plan, prepared, rows_file(tmp_path, "body"), 1))
    with pytest.raises(ExpectedError, match=r"its name ends in none of \.jsonl"):
        next(predict_file(folder, plan, prepared, tmp_path / "rows.xml", 1))
    with pytest.raises(DataError, match=r"cannot read .*absent\.csv"):
        next(predict_file(folder, plan, prepared, tmp_path / "absent.csv", 1))
    _, other = make_run()
    with pytest.raises(ExpectedError, match=r"but this is a run of causal_lm; let it write with zerofleet generate"):
        next(predict_file(folder, other, prepared, rows_file(tmp_path), 1))
