"""Asking a language model in words: the likeliest answer by hand, shots that are not asked, and what does not fit."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from launcher.cli.main import app
from launcher.errors import DataError, RecipeError
from launcher.training.prompting import PromptSection, answer_scores, make_questions, read_prompts
from tests.support.ranks import Ranks

ROWS = [{"text": f"word {number}", "label": "pos" if number % 3 else "neg"} for number in range(12)]
VERBALIZERS = {"pos": " good", "neg": " bad"}


def section(**changes: Any) -> PromptSection:
    fields = {"file": "rows.jsonl", "template": "{text}: is", "verbalizers": VERBALIZERS}
    return PromptSection.model_validate({**fields, **changes})


def test_answers_are_scored_as_by_hand(model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    answers = [" good", " very bad"]
    found = answer_scores(model, tokenizer, "def question(", answers)
    for answer, score in zip(answers, found, strict=True):
        asked = tokenizer("def question(", add_special_tokens=False, return_tensors="pt")["input_ids"]
        own = tokenizer(answer, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert own.shape[1] > 1
        ids = torch.cat([asked, own], dim=1)
        labels = ids.clone()
        labels[:, : asked.shape[1]] = -100
        expected = -model(input_ids=ids, labels=labels).loss.item() * own.shape[1]
        assert score == pytest.approx(expected, abs=1e-4)
    with pytest.raises(DataError, match="the model reads 8; ask with fewer shots"):
        answer_scores(model, tokenizer, "def question(a, b, c, d): return", answers, longest=8)


def test_shots_come_with_their_answers_and_are_not_asked() -> None:
    plain, labels = make_questions(ROWS, section())
    assert plain[:2] == ["word 0: is", "word 1: is"]
    assert labels == [row["label"] for row in ROWS]
    questions, labels = make_questions(ROWS, section(shots=3, separator=" | "))
    assert len(questions) == len(labels) == 9
    *shots, last = questions[0].split(" | ")
    assert len(shots) == 3
    answered = {f"{row['text']}: is{VERBALIZERS[row['label']]}" for row in ROWS}
    assert set(shots) < answered
    assert all(question.rpartition(" | ")[0] == questions[0].rpartition(" | ")[0] for question in questions)
    assert not {shot.partition(":")[0] for shot in shots} & {
        q.rpartition(" | ")[2].partition(":")[0] for q in questions
    }
    assert last == "word 0: is" or "word 0: is neg" not in shots


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"verbalizers": {"pos": " good", "neu": " fair"}}, "the label 'neg' in rows.jsonl has no verbalizer; did you"),
        ({"template": "{review}"}, "the template does not fit rows.jsonl: .* its columns are text, label"),
        ({"label": "stars"}, "rows.jsonl has no column stars; it has text, label"),
        ({"shots": 12}, "12 rows, of which 12 are shots: none is left"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(DataError, match=text):
        make_questions(ROWS, section(**changes))


def test_a_wrong_file_is_refused_with_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text('file: rows.jsonl\ntemplat: "{text}"\nverbalizers: {pos: " good", neg: " good"}\n')
    with pytest.raises(RecipeError, match=r"line 2 .*did you mean template"):
        read_prompts(path)


@pytest.mark.distributed
def test_before_and_after_training_stand_side_by_side(tmp_path: Path, two_ranks: Ranks, make_run, prepared) -> None:
    directory, _ = make_run("max_steps=3", "eval_steps=null")
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    (directory.path / "data.json").write_text(json.dumps({"directory": str(prepared.directory)}))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "prompts.yaml").write_text(
        'file: rows.jsonl\ntemplate: "{text}: is"\nverbalizers: {pos: " good", neg: " bad"}\nshots: 1\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main", "evaluate", str(directory.path), "--prompts",
         str(tmp_path / "prompts.yaml"), "--json"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["examples"] == 11
    assert set(found["before"]) == set(found["after"])
    assert {"loss", "accuracy", "f1_macro", "majority_accuracy"} <= set(found["after"])
    assert abs(found["before"]["loss"] - found["after"]["loss"]) > 1e-6
    command = ["evaluate", str(directory.path), "--prompts", str(tmp_path / "prompts.yaml"), "--max-samples", "4"]
    few = CliRunner().invoke(app, [*command, "--json"])
    assert few.exit_code == 0, few.output
    assert json.loads(few.stdout[few.stdout.index("{") :])["examples"] == 4
