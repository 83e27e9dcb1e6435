"""The shipped recipes of single tasks reach what their comments say, trained by two real ranks."""

from pathlib import Path

import pytest

from launcher.data.prepare import prepare
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.recipe.loading import load_recipe
from launcher.run_directory import RunDirectory
from launcher.submit import write_run
from tests.support.ranks import Ranks

# Name, metric, what it must exceed (or, for losses, stay below), and overrides that keep the test short.
REACHED = [
    ("finetune/text-classification", "eval_accuracy", 0.75, ("training.max_steps=80",)),
    ("finetune/image-classification", "eval_accuracy", 0.8, ()),
    ("pretrain/masked-language-model", "eval_masked_lm_loss", 5.6, ("training.max_steps=60",)),
    ("finetune/supervised", "eval_loss", 5.6, ("training.max_steps=50",)),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "metric", "bound", "overrides"), REACHED, ids=[case[0] for case in REACHED])
def test_a_shipped_recipe_reaches_its_figure(tmp_path: Path, two_ranks: Ranks, name, metric, bound, overrides) -> None:
    recipe = load_recipe(name, (*overrides, f"data.cache_directory={tmp_path}/cache", "export.at_end=false"))
    prepared = prepare(recipe, progress=False)
    plan = make_plan(recipe, Resources(nodes=1, workers_per_node=2))
    directory = RunDirectory.at(tmp_path / "run")
    write_run(directory, plan)
    results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    value = results[0]["metrics"][metric]
    print(name, metric, value, results[0]["metrics"])
    assert value < bound if metric.endswith("loss") else value > bound
