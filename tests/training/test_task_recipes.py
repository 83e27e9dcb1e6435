"""The shipped recipes of single tasks reach what their comments say, trained by two real ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.data.prepare import prepare
from launcher.data.store import PreparedData
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.recipe.loading import load_recipe
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.submit import write_run
from launcher.tasks.masked_lm import NO_WORD
from tests.support.ranks import Ranks
from tests.support.recipes import SMOKES


def unigram(prepared: PreparedData, field: str, counted: Callable[[Any], Any]) -> float:
    """Nats a target of a model that knows only how often each token is one (Laplace smoothing), on held-out data."""

    def tokens(split: str) -> Any:
        samples = [part[index] for part in prepared.split(split) for index in range(len(part))]
        return np.concatenate([sample[field][counted(sample)].astype(np.int64) for sample in samples])

    counts = np.bincount(tokens("train"), minlength=1100) + 1.0
    return float(-np.log(counts[tokens("validation")] / counts.sum()).mean())


def of_hidden_tokens(metrics: dict[str, float], prepared: PreparedData) -> tuple[float, float]:
    return metrics["eval_masked_lm_loss"], unigram(prepared, "input_ids", lambda s: s["words"] != NO_WORD) - 0.05


def of_completions(metrics: dict[str, float], prepared: PreparedData) -> tuple[float, float]:
    return metrics["eval_loss"], unigram(prepared, "labels", lambda s: s["labels"] >= 0) - 0.1


def of_few_targets(metrics: dict[str, float], prepared: PreparedData) -> tuple[float, float]:
    """Thirty steps are not many: no margin."""
    return metrics["eval_loss"], unigram(prepared, "labels", lambda s: s["labels"] >= 0)


def of_targets(metrics: dict[str, float], prepared: PreparedData) -> tuple[float, float]:
    return metrics["eval_loss"], unigram(prepared, "labels", lambda s: s["labels"] >= 0) - 0.1


def of_pairs(metrics: dict[str, float], prepared: PreparedData) -> tuple[float, float]:
    return 1 - metrics["eval_reward_accuracy"], 0.5


def of_ranks(metrics: dict[str, float], prepared: PreparedData) -> tuple[float, float]:
    """Chance: the mean of 1/k over all places."""
    total = sum(len(part) for part in prepared.split("validation"))
    return 1 - metrics["eval_mean_reciprocal_rank"], 1 - 2 * sum(1 / place for place in range(1, total + 1)) / total


def of_errors(margin: float) -> Callable[[dict[str, float], PreparedData], tuple[float, float]]:
    return lambda metrics, prepared: (1 - metrics["eval_accuracy"], 1 - metrics["eval_majority_accuracy"] - margin)


def of_metric(name: str, bound: float) -> Callable[[dict[str, float], PreparedData], tuple[float, float]]:
    return lambda metrics, prepared: (1 - metrics[f"eval_{name}"], 1 - bound)


def of_classes(metrics: dict[str, float], prepared: PreparedData) -> tuple[float, float]:
    return 1 - metrics["eval_f1_micro"], 1 - metrics["eval_majority_f1_micro"] - 0.02


# Name; what must be below what; and overrides that keep the test short. The first and every sixth run by default: tasks
# that no other test trains over two workers under ZeRO 2.
REACHED = [
    ("pretrain/masked-language-model", of_hidden_tokens, ("evaluation.eval_steps=150",)),
    ("finetune/text-classification", of_errors(0.1), ("training.max_steps=80",)),
    ("finetune/image-classification", of_errors(0.7), ()),
    ("finetune/supervised", of_completions, ("training.max_steps=60",)),
    ("finetune/preference", of_pairs, ("training.max_steps=50",)),
    ("finetune/sentence-embedding", of_ranks, ()),
    ("finetune/reward-model", of_pairs, ("training.max_steps=30",)),
    ("finetune/sequence-to-sequence", of_targets, ()),
    ("finetune/question-answering", of_metric("exact_match", 0.5), ()),
    ("finetune/multi-label", of_classes, ()),
    ("finetune/regression", of_metric("r2", 0.5), ()),
    ("finetune/sentence-pairs", of_errors(0.25), ()),
    ("finetune/image-folder", of_errors(0.7), ()),
    ("finetune/weight-average", of_errors(0.1), ()),
    ("finetune/adversarial", of_errors(0.1), ()),
    ("finetune/token-classification", of_metric("entity_f1", 0.35), ()),
    ("finetune/early-stopping", of_errors(0.25), ()),
    ("finetune/prompt-evaluation", of_completions, ()),
    ("finetune/chat", of_completions, ("training.max_steps=30", "data.packing=first_fit_decreasing")),
    ("pretrain/vision-transformer", of_errors(0.5), ()),
    ("pretrain/replay", of_targets, ()),
    ("pretrain/long-context", of_few_targets, ()),
]
CASES = [pytest.param(*case, id=case[0], marks=pytest.mark.matrix(every=6)) for case in REACHED]


SMALL = [
    pytest.param(name, marks=() if name == "finetune/resnet50" else pytest.mark.exhaustive)
    for name, overrides in SMOKES.items()
    if not any("smollm2" in override for override in overrides)
]
"""Smoke variants that need no fetched weights; the quickest one runs by default."""


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "measured", "overrides"), CASES)
def test_a_shipped_recipe_beats_its_baseline(
    tmp_path: Path, two_ranks: Ranks, assets: Path, monkeypatch: pytest.MonkeyPatch, name, measured, overrides
) -> None:
    monkeypatch.setenv("ZEROFLEET_ASSETS", str(assets))
    recipe = load_recipe(name, (*overrides, f"data.cache_directory={tmp_path}/cache", "export.at_end=false"))
    prepared = prepare(recipe, progress=False)
    plan = make_plan(recipe, Resources(nodes=1, workers_per_node=2))
    directory = RunDirectory.at(tmp_path / "run")
    write_run(directory, plan)
    results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    value, baseline = measured(results[0]["metrics"], prepared)
    print(f"{name}: {value:.3f}, baseline {baseline:.3f}, {results[0]['metrics']}")
    assert value < baseline


@pytest.mark.distributed
@pytest.mark.parametrize("name", SMALL)
def test_the_smoke_variant_of_a_recipe_for_gpus_learns(
    tmp_path: Path, two_ranks: Ranks, assets: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("ZEROFLEET_ASSETS", str(assets))
    short = (
        "training.max_steps=48",
        "evaluation.eval_steps=48",
        "evaluation.max_eval_samples=16",
        "logging.logging_steps=4",
    )
    more = (
        f"data.cache_directory={tmp_path}/cache",
        "export.at_end=false",
        "checkpoint.keep_best=0",
        "keep_every=null",
    )
    recipe = load_recipe(name, (*SMOKES[name], *short, *more))
    prepared = prepare(recipe, progress=False)
    directory = RunDirectory.at(tmp_path / "run")
    write_run(directory, make_plan(recipe, Resources(nodes=1, workers_per_node=2)))
    results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    assert results[0]["status"] == "complete"
    losses = [record["loss"] for record in read_json_lines(directory.metrics) if "loss" in record]
    assert np.mean(losses[-4:]) < np.mean(losses[:4])
