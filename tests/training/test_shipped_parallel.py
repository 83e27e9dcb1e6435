"""The small recipes of `recipes/parallel` train."""

from pathlib import Path

import pytest

from launcher.data.prepare import prepare
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.recipe.loading import load_recipe
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.submit import write_run
from tests.support.ranks import Ranks


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes' data is the same, so it is prepared once."""
    return tmp_path_factory.mktemp("cache")


@pytest.mark.matrix
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["expert", "tensor", "sequence", "pipeline", "zero3-offload"])
def test_it_trains_and_exports(name: str, two_ranks: Ranks, cache: Path, tmp_path: Path) -> None:
    changes = (f"data.cache_directory={cache}", "max_steps=6", "warmup_steps=1", "logging_steps=1")
    recipe = load_recipe(f"parallel/{name}", (*changes, "max_eval_samples=8", "tensorboard=false"))
    directory = RunDirectory.at(tmp_path / "run")
    write_run(directory, make_plan(recipe, Resources(workers_per_node=2)))
    data = prepare(recipe, progress=False)
    first, _ = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(data.directory))
    assert first["status"] == "complete"
    losses = [record["loss"] for record in read_json_lines(directory.metrics) if "loss" in record]
    assert losses[-1] < losses[0]
    assert (directory.export / "model.safetensors").is_file()
