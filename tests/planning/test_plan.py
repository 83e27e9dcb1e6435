import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from launcher.errors import PlanError
from launcher.planning.layout import Resources
from launcher.planning.plan import Plan, make_plan, replan
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
TWO = Resources(workers_per_node=2)

LLAMA_405B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def test_a_plan_holds_everything_that_a_run_needs(make_recipe: MakeRecipe) -> None:
    plan = make_plan(make_recipe(), TWO)
    assert plan.layout.data_parallel_size == 2
    assert plan.batch.global_batch_size == 8
    assert plan.zero_stage == 2
    assert plan.model is not None
    assert plan.model.vocab_size == 1000
    assert plan.transformers_config is not None
    assert plan.transformers_config["vocab_size"] == 1000
    assert plan.memory_by_stage is not None
    assert list(plan.memory_by_stage) == [0, 1, 2, 3]
    assert plan.memory == plan.memory_by_stage[2]
    assert plan.deepspeed_config["train_micro_batch_size_per_gpu"] == 2
    assert plan.notes == ()


def test_a_plan_survives_its_way_through_json(make_recipe: MakeRecipe) -> None:
    plan = make_plan(make_recipe({"zero.stage": 3, "zero.offload_optimizer": "cpu"}), TWO)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert json.loads(plan.model_dump_json()) == plan.model_dump(mode="json")


def test_a_plan_of_another_form_is_refused(make_recipe: MakeRecipe) -> None:
    content = make_plan(make_recipe(), TWO).model_dump(mode="json")
    for change in ({"version": 2}, {"later_field": 1}):
        with pytest.raises(ValidationError):
            Plan.model_validate({**content, **change})


def test_problems_of_all_parts_are_told_at_once(make_recipe: MakeRecipe) -> None:
    changes = {
        "training.global_batch_size": 9,
        "model.config.num_key_value_heads": 3,
        "data.sequence_length": 4096,
        "deepspeed.overrides": {"zero_optimisation": {}},
        "zero.stage": 0,
        "zero.offload_optimizer": "cpu",
    }
    with pytest.raises(PlanError) as caught:
        make_plan(make_recipe(changes), TWO)
    assert caught.value.source == "small"
    assert {problem.where for problem in caught.value.problems} == {
        "training.global_batch_size",
        "model.config.num_key_value_heads",
        "data.sequence_length",
        "deepspeed.overrides.zero_optimisation",
        "zero.offload_optimizer",
    }


def test_a_wrong_layout_does_not_hide_the_rest(make_recipe: MakeRecipe) -> None:
    changes = {
        "parallel.tensor_parallel_size": 4,
        "deepspeed.overrides": {"amp": {}},
        "training.micro_batch_size": None,
    }
    with pytest.raises(PlanError) as caught:
        make_plan(make_recipe(changes), TWO)
    assert {problem.where for problem in caught.value.problems} == {
        "parallel",
        "deepspeed.overrides.amp",
    }


def test_a_hub_model_is_planned_as_far_as_it_can_be(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"model.config": None, "model.model_name_or_path": "owner/model"})
    plan = make_plan(recipe, TWO)
    assert (plan.model, plan.memory, plan.memory_by_stage, plan.transformers_config) == (None, None, None, None)
    assert "the config of owner/model is on the hub and is not read here" in plan.notes[0]
    assert replan(plan, 4).notes == plan.notes


@pytest.mark.parametrize(
    ("changes", "device", "note"),
    [
        (
            {"model.config": {"model_type": "brand_new", "vocab_size": 2000}},
            "cpu",
            "are not counted: model_type 'brand_",
        ),
        ({"model.config.my_note": 1}, "cpu", "transformers knows no my_note in this family, and ignores it"),
        (
            {"deepspeed.overrides": {"zero_optimization": {"round_robin_gradients": True}}},
            "cpu",
            "memory is not counted: zero_optimization.round_robin_gradients = True",
        ),
        ({"training.precision": "fp16"}, "cpu", "fp16 on CPU needs a processor"),
    ],
)
def test_notes_say_what_a_person_should_know(
    make_recipe: MakeRecipe, changes: dict[str, Any], device: str, note: str
) -> None:
    plan = make_plan(make_recipe(changes), Resources.model_validate({"device": device}))
    assert len(plan.notes) == 1
    assert note in plan.notes[0]
    assert (plan.memory is None) == ("not counted" in note)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16")])
def test_no_notes_where_all_is_well(make_recipe: MakeRecipe, stage: int, precision: str) -> None:
    plan = make_plan(make_recipe({"zero.stage": stage, "training.precision": precision}), TWO)
    assert plan.notes == ()
    fp16 = make_recipe({"training.precision": "fp16"})
    assert make_plan(fp16, Resources(device="cuda")).notes == ()


def test_replanning_keeps_the_global_batch(make_recipe: MakeRecipe) -> None:
    plan = make_plan(make_recipe({"training.gradient_accumulation_steps": 4}), Resources(nodes=2, workers_per_node=2))
    assert plan.batch.global_batch_size == 32
    for size, micro, accumulation in ((1, 2, 16), (2, 2, 8), (8, 2, 2), (16, 2, 1), (32, 1, 1)):
        smaller = replan(plan, size)
        assert smaller.layout.world_size == smaller.layout.data_parallel_size == smaller.resources.world_size == size
        batch = smaller.batch
        assert (batch.micro_batch_size, batch.gradient_accumulation_steps) == (micro, accumulation)
        assert batch.global_batch_size == 32
        assert smaller.deepspeed_config["train_micro_batch_size_per_gpu"] == micro
        assert smaller.deepspeed_config["gradient_accumulation_steps"] == accumulation
        assert replan(smaller, 4).batch.global_batch_size == 32
    assert replan(plan, 4) == plan


def test_replanning_keeps_the_experts_groups(make_recipe: MakeRecipe) -> None:
    experts = {"model.config.model_type": "mixtral", "parallel.expert_parallel_size": 2}
    plan = make_plan(make_recipe({**experts, "training.gradient_accumulation_steps": 6}), Resources(workers_per_node=4))
    assert replan(plan, 2).layout.expert_parallel_size == 2
    with pytest.raises(PlanError, match=r"3 workers cannot keep global_batch_size 48; sizes that can: 2, 4, 6, 8"):
        replan(plan, 3)


def test_a_replan_is_what_a_fresh_plan_would_be(make_recipe: MakeRecipe) -> None:
    changes = {"training.gradient_accumulation_steps": None, "training.global_batch_size": 16, "zero.stage": 3}
    recipe = make_recipe(changes)
    eight = Resources(nodes=4, workers_per_node=2)
    assert replan(make_plan(recipe, TWO), 8) == make_plan(recipe, eight)


def test_replanning_reads_nothing_from_disk(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 1000}))
    deepspeed = tmp_path / "mine.json"
    deepspeed.write_text('{"zero_optimization": {"stage": 1}}')
    plan = make_plan(make_recipe({"model.config": str(path), "deepspeed.config": str(deepspeed)}), TWO)
    path.unlink()
    deepspeed.unlink()
    assert replan(plan, 4).model == plan.model
    assert replan(plan, 2) == plan


def test_a_size_that_cannot_keep_the_batch_is_refused_with_those_that_can(make_recipe: MakeRecipe) -> None:
    plan = make_plan(make_recipe(), TWO)
    for size in (3, 16, 0):
        with pytest.raises(PlanError, match=r"cannot keep global_batch_size 8; sizes that can: 1, 2, 4, 8$"):
            replan(plan, size)


def test_405_billion_parameters_on_16384_gpus_are_planned(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"model.config": LLAMA_405B, "training.micro_batch_size": 1, "zero.stage": 3})
    resources = Resources(nodes=2048, workers_per_node=8, device="cuda")
    plan = make_plan(recipe, resources)
    assert plan.model is not None
    assert plan.model.num_parameters == 405_853_388_800
