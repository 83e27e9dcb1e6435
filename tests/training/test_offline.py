"""Watching any metric, and a checkpoint without its run: measured and made to write."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.checkpoints import folders
from launcher.errors import RecipeError
from launcher.recipe.run_sections import EvaluationSection
from launcher.run_directory import read_json_lines
from launcher.tasks import Metrics
from launcher.training.evaluation import Evaluation
from launcher.training.export import checkpoint_to_export
from launcher.training.measuring import watched_score
from tests.support.ranks import Ranks
from tests.training.task_runs import run_of, write_recipe

RESNET = (
    "{model_type: resnet, num_channels: 1, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}"
)


def test_the_watched_metric_has_the_right_sign() -> None:
    evaluation, metrics = Evaluation(0.5, 10), Metrics({"f1_macro": 0.7, "mse": 3.0})

    def score(**settings: object) -> float:
        return watched_score(EvaluationSection(**settings), evaluation, metrics)  # type: ignore[arg-type]  # pydantic validates

    assert score() == 0.5
    assert score(metric_for_best_model="f1_macro") == -0.7
    assert score(metric_for_best_model="mse") == 3.0
    assert score(metric_for_best_model="mse", greater_is_better=True) == -3.0
    with pytest.raises(RecipeError, match=r"there is no metric 'f1_marco'; did you mean f1_macro\?"):
        score(metric_for_best_model="f1_marco")


@pytest.mark.distributed
def test_the_best_checkpoint_by_accuracy_is_kept_exported_and_measured_alike(tmp_path: Path, two_ranks: Ranks) -> None:
    recipe = write_recipe(
        tmp_path, "image_classification", f"{{config: {RESNET}}}", [{"type": "sklearn", "name": "digits"}],
        image={"size": 8}, checkpoint={"save_steps": 5, "save_total_limit": 1, "keep_best": 1},
        evaluation={"eval_steps": 5, "metric_for_best_model": "accuracy", "max_eval_samples": 201,
                    "early_stopping_patience": 2},
    )  # fmt: skip
    # A learning rate that jumps about, so that the best step is hardly the last one.
    directory, plan, prepared = run_of(
        recipe, tmp_path / "run", "training.max_steps=40", "training.learning_rate=0.1",
        "training.lr_scheduler_type=constant", "export.checkpoint=best", "training.micro_batch_size=8",
    )  # fmt: skip
    results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    records = {r["step"]: r for r in read_json_lines(directory.metrics) if "eval_accuracy" in r}
    best = max(records, key=lambda step: (records[step]["eval_accuracy"], -step))
    last = results[0]["step"]
    since = [step for step in records if step > best]
    assert results[0]["early_stopped"] == (len(since) == 2)
    assert [folders.step_of(path) for path in folders.complete(directory.checkpoints)] == sorted({best, last})
    assert folders.step_of(checkpoint_to_export(directory.checkpoints, plan)) == best

    # Another process, all by itself, finds the same: batch normalisation's statistics are those that were evaluated.
    (directory.path / "data.json").write_text(json.dumps({"directory": str(prepared.directory)}))
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main", "evaluate", str(directory.path), "--step", str(best),
         "--max-samples", "201", "--json"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["targets"] == 201
    assert found["metrics"]["accuracy"] == pytest.approx(records[best]["eval_accuracy"], abs=1e-9)
    assert found["metrics"]["loss"] == pytest.approx(records[best]["eval_loss"], abs=1e-4)
    assert found["report"]["confusion_matrix"]["labels"] == [str(digit) for digit in range(10)]


@pytest.mark.distributed
def test_a_checkpoint_continues_texts(tmp_path: Path, two_ranks: Ranks, make_run, prepared) -> None:
    directory, _ = make_run(
        "max_steps=2", 'evaluation.generate.prompts=["def "]', "evaluation.generate.max_new_tokens=5"
    )
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    (directory.path / "data.json").write_text(json.dumps({"directory": str(prepared.directory)}))
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main", "generate", str(directory.path), "--max-new-tokens", "5", "--json"],
        input="def \n\n  import os\n", capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["def ", "  import os"]
    (sample,) = read_json_lines(directory.path / "samples.jsonl")
    assert answers[0]["text"] == sample["text"], "as the training itself wrote"
