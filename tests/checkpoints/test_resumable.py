"""Whether and how a plan continues from a checkpoint: decided from the two records alone."""

from pathlib import Path
from typing import Any

import pytest

from launcher.checkpoints.manifest import Manifest
from launcher.checkpoints.resumable import Resumption, check_resumable, with_batch_of
from launcher.errors import CheckpointError, PlanError
from launcher.planning.layout import Layout, Resources
from launcher.planning.plan import Plan, make_plan
from launcher.recipe.schema import Recipe
from tests.checkpoints.conftest import RECIPE, manifest_of

FINGERPRINT = "f" * 32
FOLDER = Path("runs/tiny/checkpoints/step_00000004")


def recipe_with(**sections: dict[str, Any]) -> Recipe:
    fields = RECIPE.model_dump(mode="json")
    return Recipe.model_validate({**fields, **{name: {**fields[name], **change} for name, change in sections.items()}})


def plan_with(workers: int = 2, **sections: dict[str, Any]) -> Plan:
    defaults: dict[str, dict[str, Any]] = {
        "training": {"global_batch_size": 8, "precision": "fp32"},
        "zero": {"stage": 2},
        "model": {"config": MODEL},
    }
    for name, change in sections.items():
        defaults[name] = {**defaults.get(name, {}), **change}
    return make_plan(recipe_with(**defaults), Resources(workers_per_node=workers))


MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def saved_with(workers: int = 2, **facts: Any) -> Manifest:
    plan = plan_with(workers)
    manifest = manifest_of(4, layout=plan.layout, batch=plan.batch, zero_stage=plan.zero_stage, recipe=plan.recipe)
    return manifest.model_copy(update=facts)


def decide(manifest: Manifest, plan: Plan, fingerprint: str = FINGERPRINT) -> Resumption:
    return check_resumable(manifest, plan, fingerprint, FOLDER)


def test_the_same_plan_loads_the_files_as_they_are() -> None:
    assert decide(saved_with(), plan_with()) == Resumption((), data_changed=False)


@pytest.mark.parametrize(
    ("stage", "workers", "differences"),
    [
        (1, 2, ()),
        (3, 2, ("zero.stage: 2 in the checkpoint, 3 now",)),
        (2, 4, ("world_size: 2 in the checkpoint, 4 now", "data_parallel_size: 2 in the checkpoint, 4 now")),
    ],
)
def test_another_layout_is_converted_and_why_is_said(stage: int, workers: int, differences: tuple[str, ...]) -> None:
    assert decide(saved_with(), plan_with(workers, zero={"stage": stage})).differences == differences


def test_offload_moves_states_and_is_converted() -> None:
    plan = plan_with(zero={"stage": 2, "offload_optimizer": "cpu"})
    assert decide(saved_with(), plan).differences == (
        "zero_optimization.offload_optimizer: None in the checkpoint, cpu now",
    )


@pytest.mark.parametrize("kind", ["tensor", "pipeline", "sequence"])
def test_another_number_of_parts_of_the_model_is_converted(kind: str) -> None:
    layout = Layout.model_validate({"world_size": 4, "data_parallel_size": 2, f"{kind}_parallel_size": 2})
    assert decide(saved_with(layout=layout), plan_with()).differences == (
        "world_size: 4 in the checkpoint, 2 now",
        f"{kind}_parallel_size: 2 in the checkpoint, 1 now",
    )


@pytest.mark.parametrize("kind", ["tensor", "sequence"])
def test_parallel_ranks_without_zero_load_their_own_layout_only(kind: str) -> None:
    plan = plan_with(4, zero={"stage": 0}, parallel={f"{kind}_parallel_size": 2})
    text = refusal(saved_with(), plan)
    assert f"{kind}_parallel_size: 1 in the checkpoint, 2 now" in text
    assert "under ZeRO 0, tensor- and sequence-parallel ranks load their own layout only; set zero.stage to 1" in text


def test_stage_0_of_any_size_needs_no_conversion() -> None:
    assert decide(saved_with(zero_stage=0), plan_with(4, zero={"stage": 0})).differences == ()


def refusal(manifest: Manifest, plan: Plan, fingerprint: str = FINGERPRINT) -> str:
    with pytest.raises(CheckpointError) as error:
        decide(manifest, plan, fingerprint)
    return str(error.value)


def test_what_cannot_be_continued_is_refused() -> None:
    layout = Layout(world_size=4, data_parallel_size=4, expert_parallel_size=2)
    text = refusal(saved_with(layout=layout, precision="bf16"), plan_with())
    assert str(FOLDER) in text
    assert "training.precision: bf16 in the checkpoint, fp32 now" in text
    assert "Run with the checkpoint's values, or start a new run with --run-dir." in text
    text = refusal(saved_with(layout=layout), plan_with())
    assert "expert_parallel_size: 2 in the checkpoint, 1 now" in text
    assert "it cannot be converted: its experts are spread over expert_parallel_size 2" in text


def test_16_bit_states_of_stage_0_are_refused() -> None:
    plan = plan_with(training={"precision": "bf16"})
    text = refusal(saved_with(precision="bf16", zero_stage=0), plan)
    assert "zero.stage: 0 in the checkpoint, 2 now" in text
    assert "in bf16, DeepSpeed keeps the optimizer of ZeRO stage 0 in a form of its own" in text


def test_another_model_is_refused_whatever_the_recipe_says_of_data() -> None:
    plan = plan_with(model={"config": {**MODEL, "hidden_size": 64}}, data={"on_change": "continue"})
    text = refusal(saved_with(), plan)
    assert "model.config.hidden_size: 32 in the checkpoint, 64 in the recipe" in text
    assert "data.on_change" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"type": "lion"}, r"optimizer\.type: adamw in the checkpoint, lion in the recipe"),
        ({"unfreeze_every_steps": 5}, r"optimizer\.unfreeze_every_steps: not set in the checkpoint, 5 in the recipe"),
        (
            {"layer_wise_lr_decay": 0.9},
            r"optimizer\.layer_wise_lr_decay: not set in the checkpoint, 0\.9 in the recipe",
        ),
    ],
)
def test_states_of_another_optimizer_or_in_other_groups_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        decide(saved_with(), plan_with(optimizer=change))


@pytest.mark.parametrize("change", [{}, {"sequence_length": 16}])
def test_other_data_is_refused_unless_the_recipe_allows_it(change: dict[str, Any]) -> None:
    text = refusal(saved_with(), plan_with(data=change), "0" * 32)
    assert ("sequence_length: 32 in the checkpoint, 16" if change else "contents are not those of the") in text
    assert "set data.on_change: continue (from the same position) or restart (from its beginning)" in text
    for allowed in ("continue", "restart"):
        resumption = decide(saved_with(), plan_with(data={**change, "on_change": allowed}), "0" * 32)
        assert resumption == Resumption((), data_changed=True)


def test_the_global_batch_is_kept_by_accumulation() -> None:
    """The recipe says micro batch and accumulation: on other workers that is another global batch."""
    sizes = {"global_batch_size": None, "micro_batch_size": 2, "gradient_accumulation_steps": 3}
    saved = plan_with(2, training=sizes)
    manifest = manifest_of(4, layout=saved.layout, batch=saved.batch, recipe=saved.recipe)
    for workers, micro, accumulation in [(1, 2, 6), (3, 2, 2), (4, 1, 3), (6, 2, 1), (12, 1, 1)]:
        batch = with_batch_of(manifest, plan_with(workers, training=sizes)).batch
        assert (batch.micro_batch_size, batch.gradient_accumulation_steps) == (micro, accumulation)
        assert batch.global_batch_size == 12
    with pytest.raises(
        PlanError, match=r"5 workers cannot keep global_batch_size 12; sizes that can: 1, 2, 3, 4, 6, 12"
    ):
        with_batch_of(manifest, plan_with(5, training=sizes))


def test_a_batch_that_the_recipe_changed_is_meant() -> None:
    plan = plan_with(training={"global_batch_size": 16})
    assert with_batch_of(saved_with(), plan) is plan


def test_an_adapter_continues_in_its_own_layout() -> None:
    recipe = recipe_with(training={"global_batch_size": 8, "precision": "fp32"}, model={"config": MODEL})
    recipe = Recipe.model_validate({**recipe.model_dump(mode="json"), "adapter": {"method": "lora"}})
    plan = make_plan(recipe, Resources(workers_per_node=4))
    text = refusal(saved_with(recipe=recipe), plan)
    assert "world_size: 2 in the checkpoint, 4 now" in text
    assert "an adapter's checkpoint is continued in its own layout" in text
