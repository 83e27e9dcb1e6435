"""What does not combine is refused before anything starts, with what would."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import PlanError
from launcher.planning.combinations import COMBINATIONS, FAMILIES_BY_KIND, combination_of, kinds
from launcher.planning.layout import Layout, Resources
from launcher.planning.plan import make_plan
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
EXPERTS = {"model.config.model_type": "mixtral", "parallel.expert_parallel_size": 2}
TRAINING_TESTS = Path(__file__).parents[1] / "training"


def refused(recipe: Recipe, message: str, workers: int = 4) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(recipe, Resources(workers_per_node=workers))


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: "+".join(sorted(row.groups)) or "data")
def test_each_row_names_a_test_that_is_there(row: object) -> None:
    assert (TRAINING_TESTS / row.test).is_file()  # type: ignore[attr-defined]  # asserted above


def test_data_parallelism_alone_is_a_combination() -> None:
    layout = Layout(world_size=4, data_parallel_size=4)
    row = combination_of(layout)
    assert row is not None
    assert kinds(layout) == row.groups == frozenset()


def test_heads_that_do_not_divide_are_told_with_the_sizes_that_do(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"parallel.tensor_parallel_size": 4, "model.config.intermediate_size": 172})
    refused(
        recipe,
        "parallel.tensor_parallel_size: 4 does not divide the model's num_key_value_heads 2; sizes that do: 1, 2",
    )


def test_a_family_without_tensor_parallelism_is_told_with_those_that_have_it(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"model.config": {"model_type": "gpt2"}, "parallel.tensor_parallel_size": 2})
    refused(recipe, "parallel.tensor_parallel_size: tensor parallelism is not proved for gpt2, whose Conv1D layers")
    refused(recipe, f"set it to 1, or train one of {', '.join(sorted(FAMILIES_BY_KIND['tensor']))}")


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_pipeline_wants_zero_1(make_recipe: MakeRecipe, stage: int) -> None:
    recipe = make_recipe({"parallel.pipeline_parallel_size": 2, "zero.stage": stage})
    refused(recipe, f"zero.stage: is {stage}, but pipeline parallelism trains under 1: DeepSpeed's pipeline refuses")
    refused(recipe, "set it to 1")


def test_more_stages_than_layers(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"parallel.pipeline_parallel_size": 4, "zero.stage": 1})
    refused(recipe, "parallel.pipeline_parallel_size: 4 stages for 3 layers; set it to at most 3")


def test_a_family_without_a_pipeline_is_told_with_those_that_have_one(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        {"model.config": {"model_type": "gpt2"}, "parallel.pipeline_parallel_size": 2, "zero.stage": 1}
    )
    refused(recipe, "parallel.pipeline_parallel_size: pipeline parallelism is not proved for gpt2")
    refused(recipe, f"train one of {', '.join(sorted(FAMILIES_BY_KIND['pipeline']))}")


def test_weights_that_heads_share_keep_a_family_out_of_tensor_parallel_stages(make_recipe: MakeRecipe) -> None:
    both = {"parallel.tensor_parallel_size": 2, "parallel.pipeline_parallel_size": 2, "zero.stage": 1}
    recipe = make_recipe({"model.config.model_type": "qwen3", "model.config.intermediate_size": 172, **both})
    refused(recipe, "train one of llama, mistral, qwen2")


def test_a_pipeline_does_not_generate(make_recipe: MakeRecipe) -> None:
    prompts = {"evaluation.generate.prompts": ["import "]}
    recipe = make_recipe({"parallel.pipeline_parallel_size": 2, "zero.stage": 1, **prompts})
    refused(recipe, "a pipeline cannot generate text; leave evaluation.generate.prompts out")


def test_a_model_on_the_hub_is_not_cut_into_stages(make_recipe: MakeRecipe) -> None:
    hub = {"model": {"model_name_or_path": "someone/model"}, "tokenizer": {}}
    recipe = make_recipe({**hub, "parallel.pipeline_parallel_size": 2, "zero.stage": 1})
    refused(recipe, "a model on the hub is not cut into stages; download it, and name its folder")


def test_experts_of_a_dense_model(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"parallel.expert_parallel_size": 2})
    refused(recipe, "parallel.expert_parallel_size: llama has no experts; set it to 1")


def test_kinds_that_no_test_has_trained_together_are_told_with_the_nearest(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"parallel.sequence_parallel_size": 2, "parallel.tensor_parallel_size": 2})
    refused(
        recipe,
        "parallel: tensor and sequence parallelism are not trained together by a test of ours; nearest that are: "
        "tensor parallelism, sequence parallelism",
    )


@pytest.mark.parametrize("offload", [{"zero.offload_optimizer": "cpu"}, {"zero.offload_param": "cpu"}])
def test_offload_goes_with_data_parallelism_alone(make_recipe: MakeRecipe, offload: dict[str, str]) -> None:
    recipe = make_recipe({"parallel.sequence_parallel_size": 2, "zero.stage": 3, **offload})
    refused(
        recipe, "zero: no test of ours offloads with sequence parallelism; leave offload_optimizer and offload_param"
    )


def test_offload_to_nvme_by_the_deepspeed_config_is_the_same(make_recipe: MakeRecipe) -> None:
    nvme = {"zero_optimization": {"offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}}}
    recipe = make_recipe({"zero.stage": 3, "training.precision": "fp16", "deepspeed.overrides": nvme})
    refused(recipe, "zero.offload_optimizer: is nvme, and is proved in fp32 and bf16")


def test_experts_are_not_kept_in_memory(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({**EXPERTS, "fault_tolerance.memory_checkpoint.every_steps": 5})
    refused(recipe, "fault_tolerance.memory_checkpoint: meets parallel.expert_parallel_size 2, and no test of ours")


def test_adapters_are_not_kept_in_memory(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"adapter": {"method": "lora"}, "fault_tolerance.memory_checkpoint.every_steps": 5})
    refused(recipe, "fault_tolerance.memory_checkpoint: meets adapter, and no test of ours has brought an adapter back")


def test_experts_that_do_not_divide(make_recipe: MakeRecipe) -> None:
    mixtral = {"model.config.model_type": "mixtral", "model.config.num_local_experts": 6}
    recipe = make_recipe({**mixtral, "parallel.expert_parallel_size": 4})
    refused(recipe, "parallel.expert_parallel_size: 4 does not divide the model's 6 experts; sizes that do: 1, 2, 3, 6")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "AutoEP computes experts with silu, the model's with gelu; set it to 1"),
        ({"router_jitter_noise": 0.1}, "AutoEP leaves the model's router_jitter_noise out; set it to 0"),
    ],
    ids=["activation", "jitter"],
)
def test_experts_that_auto_ep_computes_otherwise(
    make_recipe: MakeRecipe, change: dict[str, object], message: str
) -> None:
    fields = {f"model.config.{name}": value for name, value in {"model_type": "mixtral", **change}.items()}
    refused(make_recipe({**fields, "parallel.expert_parallel_size": 2}), f"parallel.expert_parallel_size: {message}")


@pytest.mark.parametrize("stage", [0, 3])
def test_experts_want_zero_1_or_2(make_recipe: MakeRecipe, stage: int) -> None:
    recipe = make_recipe({**EXPERTS, "zero.stage": stage})
    refused(recipe, f"zero.stage: is {stage}, but expert parallelism trains under 1 or 2: ")
    refused(recipe, f"set it to {1 if stage == 0 else 2}")


def test_experts_with_what_no_test_has_trained(make_recipe: MakeRecipe) -> None:
    refused(
        make_recipe({**EXPERTS, "parallel.tensor_parallel_size": 2}),
        "parallel: tensor and expert parallelism are not trained together by a test of ours; nearest that are: "
        "tensor parallelism, expert parallelism",
    )
    refused(make_recipe({**EXPERTS, "zero.offload_optimizer": "cpu"}), "no test of ours offloads with expert")
    prompts = make_recipe({**EXPERTS, "evaluation.generate": {"prompts": ["a"]}})
    refused(prompts, "ranks that share experts cannot generate text; leave evaluation.generate.prompts out")


def test_a_family_whose_experts_auto_ep_does_not_divide(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({**EXPERTS, "model.config": {"model_type": "gpt_oss"}})
    refused(recipe, "expert parallelism is not proved for gpt_oss; set it to 1, or train one of mixtral, qwen2_moe, ")


def test_a_dense_model_has_no_routers_to_balance(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"training.router_aux_loss_coef": 0.01})
    refused(recipe, "training.router_aux_loss_coef: llama has no experts; leave it out")


def test_only_language_models_balance_their_routers(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is for causal_lm, not for sequence_classification"):
        make_recipe({"training.router_aux_loss_coef": 0.01, "task": "sequence_classification"})


def test_conversations_are_data_parallel(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match=r"data\.format chat makes batches of different lengths"):
        make_recipe({"parallel.pipeline_parallel_size": 2, "data.format": "chat"})
