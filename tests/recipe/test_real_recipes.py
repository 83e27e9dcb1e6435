"""Recipes of real models: planned on the cluster that their second line names, and counted as transformers does."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from launcher.cli.main import app
from launcher.planning.plan import Plan
from launcher.recipe.tasks import TASKS

REPOSITORY = Path(__file__).resolve().parents[2]
TEXTS = {
    path.relative_to(REPOSITORY / "recipes").with_suffix("").as_posix(): path.read_text()
    for path in (REPOSITORY / "recipes").rglob("*.yaml")
}
RECIPES = {name: text.splitlines()[1] for name, text in TEXTS.items()}
FETCHED = {"finetune/movie-reviews": ("minilm", "bert"), "finetune/smollm2-lora": ("smollm2-135m-instruct", "llama")}
"""Recipes of weights that benchmarks/real_weights.py fetches: their folder, and the kind of model in it."""
REAL = {name: line for name, line in RECIPES.items() if line.startswith("# zerofleet plan ") and "--gpu" in line}


def planned(*arguments: str) -> Plan:
    outcome = CliRunner().invoke(app, [*arguments, "--json"])
    assert outcome.exit_code == 0, outcome.output + repr(outcome.exception)
    return Plan.model_validate_json(outcome.stdout)


def meta_count(config: dict[str, object]) -> int:
    fields = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **fields)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    return sum(parameter.numel() for parameter in model.parameters())


def test_there_are_real_recipes() -> None:
    assert len(REAL) >= 5


@pytest.mark.parametrize("name", REAL)
def test_a_real_recipe_fits_the_cluster_that_it_names(name: str) -> None:
    plan = planned(*shlex.split(REAL[name].removeprefix("# zerofleet ")))
    assert plan.recipe.name == name.rpartition("/")[2]
    assert plan.resources.device == "cuda"
    assert plan.ranks is not None
    assert plan.step is not None
    assert 0.2 < plan.step.mfu < 0.6


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders where fetched weights would be, with the configuration alone, which is all that a plan reads."""
    monkeypatch.setenv("ZEROFLEET_ASSETS", str(tmp_path))
    for folder, model_type in FETCHED.values():
        AutoConfig.for_model(model_type).save_pretrained(tmp_path / folder)


def test_recipes_of_fetched_weights_are_known() -> None:
    named = {name for name, text in TEXTS.items() if 'model_name_or_path: "${env:ZEROFLEET_ASSETS:-' in text}
    assert named == set(FETCHED)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.usefixtures("assets")
def test_every_recipe_is_planned_and_has_the_parameters_that_transformers_counts(name: str) -> None:
    line = RECIPES[name] if RECIPES[name].startswith("# zerofleet plan ") else f"# zerofleet plan {name}"
    plan = planned(*shlex.split(line.removeprefix("# zerofleet ")))
    if plan.transformers_config is None or not TASKS[plan.recipe.task].generates:
        assert plan.model is None
        assert any("not checked" in note or "memory is not counted" in note for note in plan.notes)
        return
    assert plan.model is not None
    assert plan.model.num_parameters == meta_count(plan.transformers_config)


def test_405b_on_16_384_gpus_is_planned() -> None:
    overrides = ("training.global_batch_size=2048", "parallel.tensor_parallel_size=8")
    plan = planned("plan", "parallel/llama3-405b", *overrides, "--gpu", "H100-80GB", "--nodes", "2048")
    assert plan.layout.world_size == 16_384
    assert plan.model is not None
    assert plan.model.num_parameters == 405_853_388_800
    assert json.loads(plan.model_dump_json())["resources"]["accelerator"] == "H100-80GB"
