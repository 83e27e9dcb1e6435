import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import PlanError
from launcher.planning.deepspeed_config import DeepSpeedPlan, make_deepspeed_config, with_batch
from launcher.planning.deepspeed_keys import key_problems
from launcher.planning.layout import BatchPlan, Layout
from launcher.recipe.catalogue import deepspeed_configs_root
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]

SHIPPED = {"zero0", "zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"}
LAYOUT = Layout(world_size=2, data_parallel_size=2)
BATCH = BatchPlan(micro_batch_size=2, gradient_accumulation_steps=3, global_batch_size=12)


def resolve(recipe: Recipe) -> DeepSpeedPlan:
    return make_deepspeed_config(recipe, LAYOUT, BATCH)


def problems_of(recipe: Recipe) -> dict[str, list[str]]:
    with pytest.raises(PlanError) as caught:
        resolve(recipe)
    found: dict[str, list[str]] = {}
    for problem in caught.value.problems:
        found.setdefault(problem.where, []).append(problem.message)
    return found


def file_with(folder: Path, content: Any) -> str:
    path = folder / "my.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return str(path)


def leaves(config: dict[str, Any]) -> list[Any]:
    return [leaf for value in config.values() for leaf in (leaves(value) if isinstance(value, dict) else [value])]


def test_the_shipped_files() -> None:
    found = {path.stem for path in deepspeed_configs_root().glob("*.json")}
    assert found == SHIPPED
    for name in found:
        content = json.loads((deepspeed_configs_root() / f"{name}.json").read_text())
        assert list(key_problems(content)) == []
        assert f"zero{content['zero_optimization']['stage']}" == name.partition("_")[0]
        assert ("offload_optimizer" in content["zero_optimization"]) == name.endswith("offload")


def test_the_recipes_values_fill_the_file(make_recipe: MakeRecipe) -> None:
    changes = {
        "training.learning_rate": 0.002,
        "training.max_grad_norm": 0.0,
        "training.precision": "fp16",
        "optimizer.weight_decay": 0.1,
        "optimizer.adam_beta2": 0.98,
        "optimizer.adam_epsilon": 1e-6,
    }
    plan = resolve(make_recipe(changes))
    assert plan.config == {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": False},
        "fp16": {"enabled": True},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": 0.002,
                "betas": [0.9, 0.98],
                "eps": 1e-6,
                "weight_decay": 0.1,
                "torch_adam": True,
                "fused": True,
            },
        },
        "zero_optimization": {"stage": 2},
    }
    assert plan.source == "deepspeed_configs/zero2.json"


def test_an_empty_file_gives_the_same_as_the_shipped_one(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    empty = resolve(make_recipe({"deepspeed.config": file_with(tmp_path, {})}))
    assert empty.config == resolve(make_recipe()).config


@pytest.mark.parametrize(
    ("stage", "optimizer", "param", "source"),
    [
        (None, None, None, "zero2"),
        (0, None, None, "zero0"),
        (1, "none", "none", "zero1"),
        (1, "cpu", None, "zero1"),
        (2, "cpu", None, "zero2_offload"),
        (None, "cpu", None, "zero2_offload"),
        (3, None, None, "zero3"),
        (3, "cpu", None, "zero3"),
        (3, "none", "cpu", "zero3"),
        (3, "cpu", "cpu", "zero3_offload"),
    ],
)
def test_stage_and_offload_pick_the_file_and_are_what_comes_out(
    make_recipe: MakeRecipe, stage: int | None, optimizer: str | None, param: str | None, source: str
) -> None:
    recipe = make_recipe({"zero.stage": stage, "zero.offload_optimizer": optimizer, "zero.offload_param": param})
    plan = resolve(recipe)
    assert plan.source == f"deepspeed_configs/{source}.json"
    assert plan.zero_stage == plan.config["zero_optimization"]["stage"] == (2 if stage is None else stage)
    assert plan.offload_optimizer == (optimizer or "none")
    assert plan.offload_param == (param or "none")
    offload = plan.config["zero_optimization"].get("offload_optimizer", {"device": "none"})
    assert offload["device"] == plan.offload_optimizer
    assert "auto" not in leaves(plan.config)


@pytest.mark.parametrize("name", ["zero3_offload", "zero3_offload.json"])
def test_a_shipped_file_can_be_named(make_recipe: MakeRecipe, name: str) -> None:
    plan = resolve(make_recipe({"deepspeed.config": name}))
    assert (plan.zero_stage, plan.offload_optimizer, plan.offload_param) == (3, "cpu", "cpu")


def test_a_file_that_is_not_there(make_recipe: MakeRecipe) -> None:
    assert problems_of(make_recipe({"deepspeed.config": "zreo2"})) == {
        "deepspeed.config": ["there is no file zreo2, and none of this name is shipped; did you mean zero2?"]
    }


def test_keys_that_the_recipe_does_not_own_are_passed_on(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    content = {
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8, "overlap_comm": True, "sub_group_size": "auto"},
        "communication_data_type": "fp32",
        "csv_monitor": {"enabled": True, "job_name": "auto"},
        "optimizer": {"params": {"torch_adam": False, "adam_w_mode": True, "fused": "auto"}},
    }
    overrides = {"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}
    changes = {"deepspeed.config": file_with(tmp_path, content), "deepspeed.overrides": overrides}
    config = resolve(make_recipe(changes)).config
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000, "overlap_comm": True}
    assert config["communication_data_type"] == "fp32"
    assert config["csv_monitor"] == {"enabled": True}
    assert config["wall_clock_breakdown"] is True
    assert config["optimizer"]["params"]["torch_adam"] is False
    assert "fused" not in config["optimizer"]["params"]  # DeepSpeed's own Adams take no such argument


def test_foreach_keeps_torchs_fused_kernel_off(make_recipe: MakeRecipe) -> None:
    params = resolve(make_recipe({"deepspeed.overrides": {"optimizer": {"params": {"foreach": True}}}})).config
    assert "fused" not in params["optimizer"]["params"]


def test_what_the_file_says_as_the_recipe_does_is_no_clash(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    content = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1,
        "bf16": {"enabled": True},
        "optimizer": {"type": "adamw", "params": {"lr": 3e-4, "betas": [0.9, 0.95]}},
        "zero_optimization": {"stage": 1},
        "tensor_parallel": {"autotp_size": 0},
        "sequence_parallel_size": 1,
        "data_parallel_size": 2,
        "gradient_allreduce_op": "mean",
    }
    plan = resolve(make_recipe({"deepspeed.config": file_with(tmp_path, content), "zero.stage": 1}))
    assert "train_batch_size" not in plan.config
    assert plan.config["optimizer"]["params"]["lr"] == 3e-4


CLASHES = {
    "train_micro_batch_size_per_gpu": (4, "training.micro_batch_size", "2"),
    "gradient_accumulation_steps": (4, "training.gradient_accumulation_steps", "3"),
    "train_batch_size": (16, "training.global_batch_size", "12"),
    "gradient_clipping": (0.5, "training.max_grad_norm", "1.0"),
    "bf16.enabled": (False, "training.precision", "true"),
    "fp16.enabled": (True, "training.precision", "false"),
    "optimizer.type": ("Adam", "optimizer.type", '"AdamW"'),
    "optimizer.params.lr": (0.1, "training.learning_rate", "0.0003"),
    "optimizer.params.betas": ([0.9, 0.999], "optimizer.adam_beta1", "[0.9, 0.95]"),
    "optimizer.params.eps": (1e-6, "optimizer.adam_epsilon", "1e-08"),
    "optimizer.params.weight_decay": (0.1, "optimizer.weight_decay", "0.0"),
    "zero_optimization.stage": (2, "zero.stage", "3"),
    "zero_optimization.offload_optimizer.device": ("nvme", "zero.offload_optimizer", '"cpu"'),
    "zero_optimization.offload_param.device": ("cpu", "zero.offload_param", '"none"'),
    "tensor_parallel.autotp_size": (2, "parallel.tensor_parallel_size", "1"),
    "sequence_parallel_size": (2, "parallel.sequence_parallel_size", "1"),
    "data_parallel_size": (4, "parallel", "2"),
    "expert_parallel.autoep_size": (2, "parallel.expert_parallel_size", "1"),
}
ZERO = {"zero.stage": 3, "zero.offload_optimizer": "cpu", "zero.offload_param": "none"}


def nested(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    return dict(value)


@pytest.mark.parametrize("path", CLASHES)
def test_a_clash_names_the_line_in_the_file_and_the_field_of_the_recipe(
    make_recipe: MakeRecipe, tmp_path: Path, path: str
) -> None:
    value, field, ours = CLASHES[path]
    name = file_with(tmp_path, nested(path, value))
    line = 2 + path.count(".")
    found = problems_of(make_recipe({**ZERO, "deepspeed.config": name}))
    messages = found[field]
    assert len(messages) == 1
    assert messages[0].startswith(f"is {ours}")
    assert f"but {name}:{line} sets {path} to {json.dumps(value)}" in messages[0]


def test_a_clash_with_an_override_says_so(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"deepspeed.overrides": {"gradient_clipping": 0.5}, "training.max_grad_norm": 2.0})
    assert problems_of(recipe) == {
        "training.max_grad_norm": [
            'is 2.0, but deepspeed.overrides sets gradient_clipping to 0.5; write "auto" there, or make the two agree'
        ]
    }


def test_an_override_can_hand_a_key_back_to_the_recipe(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    name = file_with(tmp_path, {"gradient_clipping": 0.5})
    changes = {"deepspeed.config": name, "deepspeed.overrides": {"gradient_clipping": "auto"}}
    assert resolve(make_recipe(changes)).config["gradient_clipping"] == 1.0


def test_unknown_keys_wrong_types_and_clashes_are_told_at_once(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    text = '{\n "gradient_cliping": 1.0,\n "steps_per_print": 1,\n "steps_per_print": 2,\n "bf16": {"enabled": 3},\n'
    text += ' "optimizer": {"params": {"lr": 0.1}}\n}'
    name = file_with(tmp_path, text)
    recipe = make_recipe({"deepspeed.config": name, "deepspeed.overrides": {"amp": {"enabled": True}}})
    found = problems_of(recipe)
    assert found["deepspeed.config"] == [
        f"{name}:3 steps_per_print: is set twice, first on line 3; keep one of the two",
        f"{name}:2 gradient_cliping: DeepSpeed 0.19.8 does not know this key; did you mean gradient_clipping?",
        f"{name}:5 bf16.enabled: is 3, but must be true or false",
    ]
    assert found["deepspeed.overrides.amp"][0].startswith("DeepSpeed 0.19.8 refuses it: NVIDIA Apex AMP")
    assert list(found) == ["deepspeed.config", "deepspeed.overrides.amp", "training.learning_rate"]


@pytest.mark.parametrize("content", [{"zero_optimization": True}, {"optimizer": {"params": []}}])
def test_a_section_of_the_wrong_type_does_not_hinder_the_rest(
    make_recipe: MakeRecipe, tmp_path: Path, content: dict[str, Any]
) -> None:
    found = problems_of(make_recipe({"deepspeed.config": file_with(tmp_path, content)}))
    assert "must be an object" in found["deepspeed.config"][0]


@pytest.mark.parametrize(("text", "message"), [("{", "my.json:1 is not JSON: "), ("[]", "my.json:1 the top level")])
def test_a_file_that_is_no_json_object(make_recipe: MakeRecipe, tmp_path: Path, text: str, message: str) -> None:
    assert message in problems_of(make_recipe({"deepspeed.config": file_with(tmp_path, text)}))["deepspeed.config"][0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler: the recipe's training.lr_scheduler_type makes the schedule"),
        ({"managed_gradient_accumulation": False}, "is false, but the training loop relies on true; remove it"),
        ({"gradient_allreduce_op": "sum"}, 'is "sum", but the training loop relies on "mean"; remove it'),
    ],
)
def test_what_the_training_loop_does_itself_is_refused(
    make_recipe: MakeRecipe, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    name = file_with(tmp_path, content)
    found = problems_of(make_recipe({"deepspeed.config": name}))["deepspeed.config"]
    assert message in found[0]
    assert f"{name}:2 " in found[0]
    overridden = problems_of(make_recipe({"deepspeed.overrides": content}))
    assert list(overridden) == [f"deepspeed.overrides.{next(iter(content))}"]


def test_schedulers_that_say_nothing_are_let_through(make_recipe: MakeRecipe) -> None:
    for nothing in ({}, "auto"):
        resolve(make_recipe({"deepspeed.overrides": {"scheduler": nothing}}))


@pytest.mark.parametrize(
    ("changes", "where", "wanted"),
    [
        ({"zero.stage": 0, "zero.offload_optimizer": "cpu"}, "zero.offload_optimizer", "1, 2 or 3"),
        ({"zero.stage": 2, "zero.offload_param": "cpu"}, "zero.offload_param", "3"),
        ({"zero.offload_param": "cpu"}, "zero.offload_param", "3"),
    ],
)
def test_offload_needs_a_stage_that_has_something_to_offload(
    make_recipe: MakeRecipe, changes: dict[str, Any], where: str, wanted: str
) -> None:
    found = problems_of(make_recipe(changes))
    assert list(found) == [where]
    assert found[where][0].endswith(f"has nothing to offload there; set zero.stage to {wanted}")


def test_another_batch_changes_only_the_batch(make_recipe: MakeRecipe) -> None:
    config = resolve(make_recipe()).config
    batch = BatchPlan(micro_batch_size=1, gradient_accumulation_steps=12, global_batch_size=12)
    changed = with_batch(config, batch)
    assert {key for key in config if config[key] != changed[key]} == {
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
    }


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_deepspeed_itself_takes_what_comes_out(make_recipe: MakeRecipe, name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    parsed = DeepSpeedConfig(resolve(make_recipe({"deepspeed.config": name})).config)
    assert parsed.gradient_clipping == 1.0
    assert parsed.train_micro_batch_size_per_gpu == 2
    assert parsed.gradient_accumulation_steps == 3
    assert parsed.bfloat16_config.enabled
    assert parsed.optimizer_params["lr"] == 3e-4
    assert parsed.zero_optimization_stage == int(name[4])
