"""The search of layouts, what fits, and what a plan says when it does not."""

import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from launcher.errors import PlanError
from launcher.planning.choices import choices
from launcher.planning.combinations import COMBINATIONS, combination_problems, kinds, model_problems
from launcher.planning.explain import compare
from launcher.planning.fit import HOST_USABLE, USABLE
from launcher.planning.kept_states import kept_bytes, saved_bytes
from launcher.planning.layout import Resources
from launcher.planning.plan import Plan, make_plan, search_layouts
from launcher.planning.search import why_slower
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]

LLAMA_8B = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192,
}  # fmt: skip
LLAMA_70B = {
    **LLAMA_8B,
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "intermediate_size": 28672,
}
BIG: dict[str, Any] = {
    "model.config": LLAMA_8B,
    "tokenizer": {"tokenizer_name_or_path": "owner/name"},
    "data.sequence_length": 8192,
    "training": {"max_steps": 10, "global_batch_size": 64},
}
H100 = Resources(workers_per_node=8, device="cuda", accelerator="H100-80GB")


def test_every_choice_is_legal_and_every_legal_row_is_tried(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(BIG)
    found = list(choices(recipe, LLAMA_8B, H100))
    assert len(found) > 100
    for choice in found:
        offloads = choice.offload_optimizer != "none"
        assert combination_problems(choice.layout, choice.zero_stage, "bf16", offloads) == []
        assert model_problems(LLAMA_8B, choice.layout, recipe) == []
        batch = choice.batch
        samples = batch.micro_batch_size * batch.gradient_accumulation_steps * choice.layout.data_parallel_size
        assert samples == batch.global_batch_size == 64
    tried = {(kinds(choice.layout), choice.zero_stage) for choice in found}
    possible = {
        (row.groups, stage)
        for row in COMBINATIONS
        if len(row.groups) < 3 and "bf16" in row.precisions and "expert" not in row.groups
        for stage in row.zero_stages
    }
    assert tried >= possible


def test_what_a_search_finds_is_what_a_plan_of_it_says(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(BIG)
    result = search_layouts(recipe, H100)
    assert 0 < len(result.best) < result.num_choices
    seconds = [float(f"{item.step.seconds:.3g}") for item in result.best]
    assert seconds == sorted(seconds)
    for item in (*result.best[:3], result.best[-1]):
        plan = make_plan(item.choice.applied(recipe), H100)
        assert plan.step is not None
        assert plan.ranks is not None
        assert plan.step.seconds == pytest.approx(item.step.seconds)
        assert max(rank.device_bytes for rank in plan.ranks) == item.rank.device_bytes
        assert plan.batch == item.choice.batch
        assert plan.zero_stage == item.choice.zero_stage
    assert why_slower(result.best[0], result.best[0]) == "as fast"
    assert "slower: " in why_slower(result.best[-1], result.best[0])


def test_what_does_not_fit_is_refused_by_a_plan_too(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(BIG)
    result = search_layouts(recipe, H100)
    assert result.closest is not None
    assert result.memory is not None
    assert result.closest.rank.device_bytes > result.memory
    with pytest.raises(PlanError, match="a rank needs"):
        make_plan(result.closest.choice.applied(recipe), H100)


def test_auto_takes_the_best_choice(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({**BIG, "parallel": "auto"})
    best = search_layouts(recipe, H100).best[0]
    plan = make_plan(recipe, H100)
    assert not plan.recipe.parallel.auto
    assert plan.recipe == best.choice.applied(recipe)
    assert plan.layout == best.choice.layout
    assert make_plan(plan.recipe, H100) == plan  # what the run directory holds is settled


def test_auto_leaves_alone_what_the_recipe_sets(make_recipe: MakeRecipe) -> None:
    fixed = {"parallel": "auto", "zero.stage": 1, "training.gradient_checkpointing": True}
    recipe = make_recipe({**BIG, **fixed})
    found = list(choices(recipe, LLAMA_8B, H100))
    assert {choice.zero_stage for choice in found} == {1}
    assert {choice.gradient_checkpointing for choice in found} == {True}
    plan = make_plan(recipe, H100)
    assert (plan.zero_stage, plan.batch.global_batch_size) == (1, 64)


def test_auto_works_on_cpu_and_keeps_the_batch_of_a_recipe_without_a_global_one(make_recipe: MakeRecipe) -> None:
    plan = make_plan(make_recipe({"parallel": "auto"}), Resources(workers_per_node=4))
    assert plan.batch.global_batch_size == 2 * 2 * 4
    assert plan.deepspeed_config["zero_optimization"].get("offload_optimizer") is None


def test_auto_and_sizes_exclude_each_other(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match="auto chooses all sizes"):
        make_recipe({"parallel": {"auto": True, "tensor_parallel_size": 2}})


@pytest.mark.parametrize(
    ("changes", "resources", "message"),
    [
        ({"parallel": "auto"}, {"accelerator": None}, "the accelerator is not known"),
        (
            {"parallel": "auto", "model.config": LLAMA_70B},
            {"workers_per_node": 1, "host_memory": 2**36},
            "none of .* layouts fits: the smallest .* of a node's memory, which has 57.6 GiB",
        ),
        (
            {"parallel": "auto", "model.config": LLAMA_70B, "zero.offload_optimizer": "none"},
            {"workers_per_node": 1},
            "none of .* layouts fits: the smallest .* of a device, which has 75.7 GiB",
        ),
        (
            {"parallel": "auto", "zero.stage": 3},
            {"workers_per_node": 7},
            "no layout of 7 workers keeps the global batch of 64",
        ),
        (
            {"parallel": "auto", "model.config": {"model_type": "bert", "vocab_size": 100}},
            {},
            "no layout can be chosen without the model, but model_type 'bert'",
        ),
        ({}, {"accelerator": "H1000"}, "H1000 is not in the catalogue; did you mean H100-.*write its numbers"),
        ({}, {"network": "carrier pigeon"}, "carrier pigeon is no network of the catalogue"),
    ],
    ids=[
        "no accelerator",
        "too large to offload",
        "too large",
        "batch",
        "unknown model",
        "unknown accelerator",
        "unknown network",
    ],
)
def test_bad_input(make_recipe: MakeRecipe, changes: dict[str, Any], resources: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make_plan(make_recipe({**BIG, **changes}), H100.model_copy(update=resources))


def refusal(recipe: Recipe, resources: Resources) -> str:
    with pytest.raises(PlanError) as caught:
        make_plan(recipe, resources)
    (problem,) = caught.value.problems
    return f"{problem.where} {problem.message}"


def test_a_micro_batch_that_cannot_fit_is_told_with_the_part_and_the_changes(make_recipe: MakeRecipe) -> None:
    training = {"max_steps": 10, "global_batch_size": 256, "micro_batch_size": 32, "gradient_checkpointing": True}
    recipe = make_recipe({**BIG, "training": training, "zero.stage": 3})
    message = refusal(recipe, H100)
    assert message.startswith("training.micro_batch_size a rank needs ")
    assert "H100-80GB has 75.7 GiB for it (activations " in message
    (advised,) = re.findall(r"it fits with training.micro_batch_size (\d+)$", message)
    smaller = {**training, "micro_batch_size": int(advised)}
    make_plan(make_recipe({**BIG, "training": smaller, "zero.stage": 3}), H100)  # the advice is true
    larger = {**training, "micro_batch_size": 2 * int(advised)}
    refusal(make_recipe({**BIG, "training": larger, "zero.stage": 3}), H100)


def test_states_that_cannot_fit_are_told_with_the_stage_that_does(make_recipe: MakeRecipe) -> None:
    training = {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 1, "gradient_checkpointing": True}
    changes = {**BIG, "training": training, "zero.stage": 0}
    message = refusal(make_recipe(changes), H100)
    assert "zero a rank needs" in message
    assert "(optimizer states 89.7 GiB" in message
    assert "it fits with zero.stage 1" in message
    make_plan(make_recipe({**changes, "zero.stage": 1}), H100)


def test_nothing_that_a_person_could_change_alone(make_recipe: MakeRecipe) -> None:
    training = {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 1}
    recipe = make_recipe({**BIG, "model.config": LLAMA_70B, "training": training, "zero.stage": 2})
    assert "no single change is enough: use more devices" in refusal(recipe, H100)


def test_offload_needs_host_memory(make_recipe: MakeRecipe) -> None:
    training = {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 1, "gradient_checkpointing": True}
    recipe = make_recipe({**BIG, "training": training, "zero": {"stage": 2, "offload_optimizer": "cpu"}})
    enough = make_plan(recipe, H100.model_copy(update={"host_memory": 2**40}))
    assert enough.ranks is not None
    needed = 8 * max(rank.host_bytes for rank in enough.ranks)
    limit = int(needed / HOST_USABLE)
    make_plan(recipe, H100.model_copy(update={"host_memory": limit + 8}))
    message = refusal(recipe, H100.model_copy(update={"host_memory": limit - 8}))
    assert message.startswith(f"zero.offload_optimizer the 8 workers of a node offload {needed / 2**30:.1f} GiB")
    assert f"the node has {limit / 2**30:.1f} GiB" in message


def test_states_in_memory_are_counted_and_need_host_memory(make_recipe: MakeRecipe) -> None:
    training = {"max_steps": 10, "global_batch_size": 16, "micro_batch_size": 1, "gradient_checkpointing": True}
    keeping = {"fault_tolerance": {"memory_checkpoint": {"every_steps": 5}}}
    recipe = make_recipe({**BIG, "training": training, "zero": {"stage": 2}, **keeping})
    for nodes, copies in ((1, 2), (2, 4)):
        machines = H100.model_copy(update={"nodes": nodes, "host_memory": 2**42})
        enough = make_plan(recipe, machines)
        assert enough.ranks is not None
        needed = kept_bytes(recipe, enough.ranks, machines)
        assert needed == copies * 8 * max(saved_bytes(rank.states) for rank in enough.ranks)
        limit = int(needed / HOST_USABLE)
        make_plan(recipe, machines.model_copy(update={"host_memory": limit + 8}))
        message = refusal(recipe, machines.model_copy(update={"host_memory": limit - 8}))
        assert message.startswith(f"fault_tolerance.memory_checkpoint keeps {needed / 2**30:.1f} GiB of states")
    assert kept_bytes(make_recipe(BIG), enough.ranks, machines) == 0


def test_a_plan_at_the_border_of_the_memory(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    training = {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 1, "gradient_checkpointing": True}
    recipe = make_recipe({**BIG, "training": training, "zero.stage": 3})
    plan = make_plan(recipe, H100)
    assert plan.ranks is not None
    needed = max(rank.device_bytes for rank in plan.ranks)
    device = "bf16_tflops: 900\nfp32_tflops: 60\nmemory_gb_per_second: 3000\nintra_node_gb_per_second: 450\n"
    device += "inter_node_gbit_per_second: 400\nhost_gb_per_second: 60\nname: mine\n"
    for factor, fits in ((1.001, True), (0.999, False)):
        path = tmp_path / f"{fits}.yaml"
        path.write_text(f"{device}memory_gib: {needed * factor / USABLE / 2**30:.6f}\n")
        mine = H100.model_copy(update={"accelerator": str(path)})
        if fits:
            assert make_plan(recipe, mine).ranks == plan.ranks
        else:
            assert "a rank needs" in refusal(recipe, mine)


def test_a_precision_that_the_device_lacks(make_recipe: MakeRecipe, tmp_path: Any) -> None:
    (tmp_path / "old.yaml").write_text(
        "name: old\nmemory_gib: 32\nfp32_tflops: 15\nfp16_tflops: 120\nmemory_gb_per_second: 900\n"
        "intra_node_gb_per_second: 150\ninter_node_gbit_per_second: 100\nhost_gb_per_second: 16\n"
    )
    old = H100.model_copy(update={"accelerator": str(tmp_path / "old.yaml")})
    assert "is bf16, which old does not compute in; set it to fp32 or fp16" in refusal(make_recipe({}), old)


def test_a_comparison_shows_both_plans(make_recipe: MakeRecipe) -> None:
    def plan(**changes: Any) -> Plan:
        training = {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 1, "gradient_checkpointing": True}
        return make_plan(make_recipe({**BIG, "training": training, "zero.stage": 3, **changes}), H100)

    before, after = plan(), plan(**{"parallel.tensor_parallel_size": 2})
    rows = {row.name: row for row in compare(before, after)}
    assert (rows["tensor-parallel ranks"].before, rows["tensor-parallel ranks"].after) == (1, 2)
    assert before.step is not None
    assert after.step is not None
    assert rows["a step"].before == before.step.seconds
    assert rows["communication inside layers"].before == 0 < rows["communication inside layers"].after
    assert rows["activations on a rank"].after < rows["activations on a rank"].before
    assert "waiting for pipeline stages" not in rows


PAIRS = {"task": "preference", "data.packing": "none"}
DATA_PARALLEL: dict[str, dict[str, Any]] = {
    "lora": {"adapter": {"method": "lora"}},
    "dora": {"adapter": {"method": "dora"}},
    "prompt": {"adapter": {"method": "prompt_tuning"}, "data.packing": "none"},
    "frozen": {"model.freeze": ["*.embed_tokens.*"]},
    "dpo": PAIRS,
    "dpo of an adapter": {**PAIRS, "adapter": {"method": "lora"}},
    "kto": {"task": "kto", "data.packing": "none"},
    "chats": {"data.format": "chat", "data.packing": "none"},
    "average": {"training.ema": {}},
    "rates by layer": {"optimizer.layer_wise_lr_decay": 0.9},
}


@pytest.mark.parametrize("kind", DATA_PARALLEL)
def test_a_layout_is_chosen_for_what_is_data_parallel(make_recipe: MakeRecipe, kind: str) -> None:
    changes = deepcopy({**BIG, "parallel": "auto", "data.sequence_length": 1024, **DATA_PARALLEL[kind]})
    recipe = make_recipe(changes)
    result = search_layouts(recipe, H100)
    assert result.best
    assert {item.choice.layout.model_parallel_size for item in result.best} == {1}
    if kind == "kto":
        assert min(item.choice.batch.micro_batch_size for item in result.best) == 2
    plan = make_plan(recipe, H100)
    assert plan.batch.global_batch_size == 64
    assert plan.ranks is not None
    (rank,) = plan.ranks
    assert rank == result.best[0].rank
    assert result.num_choices > 10


def test_what_is_held_besides_decides_what_fits(make_recipe: MakeRecipe) -> None:
    """DPO holds a second model whole, its adapter holds none, and a pair is two texts."""
    fixed = deepcopy({**BIG, **PAIRS, "zero.stage": 3, "data.sequence_length": 1024})

    def least(**changes: Any) -> int:
        result = search_layouts(make_recipe({**fixed, "parallel": "auto", **changes}), H100)
        return min(item.rank.device_bytes for item in result.best)

    simpo = least(preference={"method": "simpo"})
    model = make_plan(make_recipe({**fixed, "parallel": "auto"}), H100).model
    assert model is not None
    assert least() - simpo == 2 * model.num_parameters
    assert least(adapter={"method": "lora"}) < simpo


@pytest.mark.parametrize(
    "changes", [{"adapter": {"method": "ia3"}}, {"model.freeze": ["*.embed_tokens.*"]}], ids=["adapter", "frozen"]
)
def test_what_is_not_training_of_all_parameters_is_not_refused(
    make_recipe: MakeRecipe, changes: dict[str, Any]
) -> None:
    training = {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 1}
    recipe = make_recipe({**BIG, "training": training, "zero.stage": 0, **changes})
    plan = make_plan(recipe, H100)
    assert plan.memory is not None
    assert "activations are counted as if all of the model were trained: they are less" in plan.notes


def test_an_adapter_is_refused_where_it_does_not_fit(make_recipe: MakeRecipe) -> None:
    training = {"max_steps": 10, "global_batch_size": 8, "micro_batch_size": 1}
    lora = {**BIG, "data.sequence_length": 4096, "zero.stage": 1, "adapter": {"method": "lora"}}
    plan = make_plan(make_recipe({**lora, "training": training}), H100)
    assert plan.ranks is not None
    assert not any("activations" in note for note in plan.notes)
    assert plan.ranks[0].states.optimizer < 2**30
    message = refusal(
        make_recipe({**lora, "training": {**training, "global_batch_size": 64, "micro_batch_size": 8}}), H100
    )
    assert message.startswith("training.micro_batch_size a rank needs ")
    assert "or with training.gradient_checkpointing true" in message
