"""Exporting with the smallest weights set to zero, measured before and after."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from launcher.checkpoints import folders
from launcher.training.offline import evaluate_checkpoint, load_checkpoint, measure_alone
from launcher.training.pruning import prune_smallest
from tests.support.ranks import Ranks
from tests.training.task_runs import run_of, write_recipe

RESNET = (
    "{model_type: resnet, num_channels: 1, embedding_size: 8, hidden_sizes: [8, 16], depths: [1, 1], layer_type: basic}"
)


@pytest.mark.distributed
def test_a_pruned_export_has_its_zeros_and_says_what_they_cost(tmp_path: Path, two_ranks: Ranks) -> None:
    recipe = write_recipe(
        tmp_path,
        "image_classification",
        f"{{config: {RESNET}}}",
        [{"type": "sklearn", "name": "digits"}],
        image={"size": 8},
    )
    directory, plan, prepared = run_of(
        recipe, tmp_path / "run", "training.max_steps=80", "training.micro_batch_size=16", "training.ema={decay: 0.5}",
        "training.learning_rate=1e-2",
        "evaluation.max_eval_samples=100",
    )  # fmt: skip
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    location = {"directory": str(prepared.directory), "tokenizer_directory": str(prepared.tokenizer_directory)}
    (directory.path / "data.json").write_text(json.dumps(location))
    done = subprocess.run(
        [sys.executable, "-m", "launcher.cli.main", "export", str(directory.path), "--prune", "0.6", "--no-ema",
         "--max-samples", "100", "--json"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pruned = json.loads(done.stdout)["pruned"]
    (folder,) = folders.complete(directory.checkpoints)
    training = plan.recipe.training.model_copy(update={"ema": None})
    bare = plan.model_copy(update={"recipe": plan.recipe.model_copy(update={"training": training})})
    whole, metrics = evaluate_checkpoint(folder, bare, prepared, 100)
    assert pruned["before"] == pytest.approx({"loss": whole.loss, **metrics.values})
    assert pruned["before"]["accuracy"] > pruned["before"]["majority_accuracy"] + 0.1

    alone, task, model = load_checkpoint(folder, bare, prepared)
    exported = AutoModelForImageClassification.from_pretrained(directory.export)
    before, after = dict(model.named_parameters()), dict(exported.named_parameters())
    layers = [name for name, weight in before.items() if name.endswith("weight") and weight.ndim in (2, 4)]
    sizes = np.concatenate([before[name].detach().abs().flatten().numpy() for name in layers])
    threshold = np.sort(sizes)[round(0.6 * len(sizes)) - 1]
    assert (pruned["zeros"], pruned["weights"]) == (round(0.6 * len(sizes)), len(sizes))
    for name, weight in before.items():
        small = weight.abs() <= threshold if name in layers else torch.zeros_like(weight, dtype=torch.bool)
        assert torch.equal(after[name], torch.where(small, 0.0, weight)), name
    measured, _ = measure_alone(alone, task, exported.eval(), prepared, 100)
    assert pruned["after"]["loss"] == pytest.approx(measured.loss, abs=1e-5)
    assert abs(measured.loss - whole.loss) > 1e-4


def test_weights_that_embeddings_share_are_left() -> None:
    embedding, head, other = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5, bias=False), torch.nn.Linear(4, 4)
    head.weight = embedding.weight
    zeros, weights = prune_smallest(torch.nn.ModuleList([embedding, head, other]), 0.5)
    assert (zeros, weights) == (8, 16)
    assert embedding.weight.all()
    assert head.weight is embedding.weight
