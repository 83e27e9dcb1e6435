"""Recipes of real models: planned on the cluster that their comments name, and counted as transformers does."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from typer.testing import CliRunner

from launcher.cli.main import app
from launcher.planning.plan import Plan
from launcher.recipe.loading import load_recipe
from launcher.recipe.tasks import TASKS
from tests.support.recipes import PLANNED, SMOKES, TEXTS, lines

MINILM, SMOLLM2 = ("minilm", "bert"), ("smollm2-135m-instruct", "llama")
ADAPTED = ("smollm2-lora", "dora", "rslora", "ia3", "prefix-tuning", "prompt-tuning", "p-tuning")
FETCHED = {
    **{f"finetune/{name}": MINILM for name in ("movie-reviews", "gradual-unfreezing", "frozen-layers")},
    **{f"finetune/{name}": SMOLLM2 for name in ADAPTED},
}
"""Recipes of weights that benchmarks/real_weights.py fetches: their folder, and the kind of model in it."""
UNMEASURED = {
    f"finetune/{name}"
    for name in ("audio-classification", "continual", "dora", "gradual-unfreezing", "prefix-tuning", "prompt-tuning")
}
"""Recipes of which no run has been kept."""
REAL = {name: words for name, words in PLANNED.items() if "--gpu" in words}


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
    assert len(REAL) >= 15
    assert {"--nodes", "--gpus-per-node"} <= {word for words in REAL.values() for word in words}


@pytest.mark.parametrize("name", REAL)
def test_a_real_recipe_fits_the_cluster_that_it_names(name: str) -> None:
    plan = planned("plan", *REAL[name])
    assert plan.recipe.name == name.rpartition("/")[2]
    assert plan.resources.device == "cuda"
    if not TASKS[plan.recipe.task].generates:
        assert "Memory is not counted for this task." in TEXTS[name]
        return
    assert plan.ranks is not None
    assert plan.step is not None
    assert 0.2 < plan.step.mfu < 0.6
    figures = re.findall(r"Planned: ([\d.]+) GiB and ([\d,]+) tokens/s a GPU", TEXTS[name])
    for gib, tokens in figures:
        assert float(gib) == pytest.approx(max(rank.device_bytes for rank in plan.ranks) / 2**30, abs=0.06)
        assert float(tokens.replace(",", "")) == pytest.approx(plan.step.tokens_per_second_per_device, abs=0.6)


def test_recipes_for_gpus_have_a_smoke_variant() -> None:
    on_hub = {name for name, text in TEXTS.items() if "Needs" in text.split("\nname: ")[0] and "from the hub" in text}
    assert set(SMOKES) >= {name for name in {*REAL, *on_hub} if not name.startswith("parallel/")}
    for name, overrides in SMOKES.items():
        assert load_recipe(name, overrides).training.max_steps is not None


@pytest.mark.parametrize("name", [name for name in TEXTS if not name.startswith("parallel/")])
def test_a_recipe_says_what_it_reached(name: str) -> None:
    """By itself, or, where it needs GPUs or a model of the hub, by its smoke variant."""
    head = " ".join(lines(TEXTS[name]))
    measured = re.search(r"\bMeasured( by the smoke)?: [^.]*\d", head)
    assert (measured is None) == (name in UNMEASURED)
    assert measured is None or (measured[1] is not None) == (name in SMOKES)


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders where fetched weights would be, with the configuration alone, which is all that a plan reads."""
    monkeypatch.setenv("ZEROFLEET_ASSETS", str(tmp_path))
    for folder, model_type in FETCHED.values():
        AutoConfig.for_model(model_type).save_pretrained(tmp_path / folder)


def test_recipes_of_fetched_weights_are_known() -> None:
    named = {name for name, text in TEXTS.items() if 'model_name_or_path: "${env:ZEROFLEET_ASSETS:-' in text}
    assert named == set(FETCHED)


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.usefixtures("assets")
def test_every_recipe_is_planned_and_has_the_parameters_that_transformers_counts(name: str) -> None:
    plan = planned("plan", *PLANNED.get(name, [name]))
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
