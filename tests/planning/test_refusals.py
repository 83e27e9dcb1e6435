"""Settings that no test of ours has trained with are refused, and the message says what to set instead."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from launcher.errors import PlanError
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan, replan, search_layouts
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
HPZ = {"zero.stage": 3, "zero.hpz_partition_size": 2}
QWEN_MOE = {"model_type": "qwen3_moe", "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 4}


def zero_keys(**keys: Any) -> dict[str, Any]:
    return {"deepspeed.overrides": {"zero_optimization": keys}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training.mlp_tiles": 2, "model": {"model_name_or_path": "some/model"}, "tokenizer": {}},
            "training.mlp_tiles: is not proved for a model on the hub; leave it out, or train one of gemma, llama",
        ),
        (
            {"training.torch_compile": True, "zero.stage": 3},
            "training.torch_compile: does not go with ZeRO stage 3, whose hooks gather each module's weights in the "
            "middle of what is compiled (runtime/zero/parameter_offload.py); set zero.stage to 2, or leave it out",
        ),
        (
            {"training.torch_compile": True, "parallel.tensor_parallel_size": 2},
            "training.torch_compile: is proved for data parallelism alone; leave it out, or leave parallel out",
        ),
        (
            {"training.torch_compile": True, "model.config": QWEN_MOE},
            "training.torch_compile: is not proved for qwen3_moe; leave it out, or train one of llama, mistral, qwen3",
        ),
        (
            {"training.torch_compile": True, "training.loss_tiles": 2},
            "training.torch_compile: does not go with mlp_tiles and loss_tiles, which compute again by hand",
        ),
        (
            {"training.torch_compile": True, "adapter": {"method": "lora"}},
            "training.torch_compile: is proved for causal_lm from plain text, all of the model trained; leave it out",
        ),
        (
            {"training.mlp_tiles": 2, "model.config": QWEN_MOE},
            "training.mlp_tiles: is not proved for qwen3_moe; leave it out, or train one of gemma, llama, mistral, "
            "qwen2, qwen3",
        ),
        (
            {"training.loss_tiles": 2, "parallel.tensor_parallel_size": 2},
            "training.loss_tiles: goes with data and sequence parallelism only; leave it out",
        ),
        (
            {"training.loss_tiles": 2, "adapter": {"method": "lora"}},
            "training.loss_tiles: is for causal_lm from plain text, all of the model trained; leave it out",
        ),
        (
            {"training.mlp_tiles": 1000, "data.sequence_length": 128, "parallel.sequence_parallel_size": 2},
            "training.mlp_tiles: is 1000, more than a rank's 64 positions; set it to at most 64",
        ),
        (
            {**HPZ, "zero.stage": 2},
            "zero.hpz_partition_size: is 2, but ZeRO stage 2 keeps whole weights anyway; set zero.stage to 3",
        ),
        (
            {**HPZ, "zero.hpz_partition_size": 3},
            "zero.hpz_partition_size: is 3, which does not divide 4 workers; sizes that do: 2, 4",
        ),
        (
            {**HPZ, "parallel.tensor_parallel_size": 2},
            "zero.hpz_partition_size: is trained by our tests in data parallel runs only; leave parallel out",
        ),
        (
            {**HPZ, "zero.offload_param": "cpu"},
            "zero.hpz_partition_size: goes with no offload_param in a test of ours; leave one of them out",
        ),
        *(
            (
                zero_keys(**{key: True}),
                f"deepspeed: zero_optimization.{key} quantises on GPUs only (op_builder/quantizer.py), where no test "
                "of ours has run it; remove it",
            )
            for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
        ),
        (
            {"zero.stage": 3, "zero.offload_optimizer": "cpu", **zero_keys(offload_optimizer={"ratio": 0.5})},
            "deepspeed: zero_optimization.offload_optimizer.ratio is 0.5, and a part of the states is left on the "
            "device by DeepSpeed's own Adam for hosts alone: set optimizer.params.torch_adam to false, or leave the "
            "ratio out",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(f"{name}={each}" for name, each in value.items()),
)
def test_it_is_refused(make_recipe: MakeRecipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(make_recipe(changes), Resources(workers_per_node=4))


def test_a_run_keeps_a_number_of_workers_that_its_second_copies_divide(make_recipe: MakeRecipe) -> None:
    batch = {"training.micro_batch_size": 1, "training.gradient_accumulation_steps": 3}
    plan = make_plan(make_recipe({**HPZ, **batch}), Resources(workers_per_node=4))
    assert replan(plan, 2).layout.world_size == 2
    with pytest.raises(PlanError, match="is 2, which does not divide 3 workers"):
        replan(plan, 3)


NVME: dict[str, Any] = {
    "zero.stage": 3, "zero.offload_optimizer": "nvme", "zero.nvme_path": "/scratch", "training.precision": "fp32",
}  # fmt: skip


def nvme_keys(**keys: Any) -> dict[str, Any]:
    return zero_keys(offload_optimizer=keys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"zero.nvme_path": None},
            "zero.nvme_path: is not set, and states are offloaded to nvme; set it to a folder on a disk of each node",
        ),
        ({"zero.nvme_path": "scratch"}, "zero.nvme_path: is 'scratch'; set it to an absolute path"),
        (
            {"zero.offload_optimizer": "cpu"},
            "zero.nvme_path: nothing is offloaded to nvme; leave it out",
        ),
        (
            {"zero.stage": 2},
            "zero.offload_optimizer: is nvme, but ZeRO stage 2 keeps what is offloaded in host memory all the same "
            "(runtime/zero/stage_1_and_2.py: cpu_offload); set zero.stage to 3, or it to cpu",
        ),
        ({"zero.stage": 0}, "zero.offload_optimizer: is nvme, but ZeRO stage 0 has nothing to offload there"),
        (
            {"zero.offload_param": "nvme"},
            "zero.offload_param: is nvme, from where no test of ours has trained",
        ),
        ({"zero.offload_param": "cpu"}, "zero.offload_optimizer: goes with no offload_param in a test of ours"),
        ({"optimizer.type": "lion"}, "zero.offload_optimizer: is nvme, and is proved with adamw of PyTorch alone"),
        ({"training.precision": "fp16"}, "zero.offload_optimizer: is nvme, and is proved in fp32 and bf16"),
        ({"adapter": {"method": "lora"}}, "zero.offload_optimizer: is nvme, where no test of ours has trained a model"),
        (
            {"optimizer.layer_wise_lr_decay": 0.9},
            "zero.offload_optimizer: is nvme, where no test of ours has trained layers at rates of their own",
        ),
        (
            {"training.ema": {}},
            "training.ema: is not proved with DeepSpeed's zero_optimization.offload_optimizer.device = 'nvme'",
        ),
        (
            {"parallel.tensor_parallel_size": 2},
            "zero: no test of ours offloads with tensor parallelism; leave offload_optimizer and offload_param out",
        ),
        (
            nvme_keys(pipeline_write=True),
            "zero.offload_optimizer.pipeline_write: pipeline_write = True is not proved with nvme, whose files change "
            "while a checkpoint reads them; leave it out",
        ),
        (
            {"fault_tolerance.memory_checkpoint.every_steps": 5},
            "fault_tolerance.memory_checkpoint: keeps in host memory what zero.offload_optimizer nvme moves out of it",
        ),
        (nvme_keys(ratio=0.5), "zero.offload_optimizer.ratio: ratio = 0.5 is not proved with nvme; leave it out"),
        (
            nvme_keys(buffer_count=3),
            "zero.offload_optimizer.buffer_count: is 3, and Adam needs 4 at once: weights, gradients, two moments; set "
            "it to 4 or more",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(f"{name}={each}" for name, each in value.items()),
)
def test_what_does_not_go_with_states_on_nvme(make_recipe: MakeRecipe, changes: dict[str, Any], message: str) -> None:
    make_plan(make_recipe(NVME), Resources(workers_per_node=4))
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(make_recipe({**NVME, **changes}), Resources(workers_per_node=4))


def test_no_layout_is_chosen_for_states_on_nvme(make_recipe: MakeRecipe) -> None:
    for name in ("offload_optimizer", "offload_param"):
        recipe = make_recipe({"zero": {"stage": 3, name: "nvme"}})
        with pytest.raises(PlanError, match=f"zero.{name}: is nvme, whose time is not known, so no layout"):
            search_layouts(recipe, Resources(workers_per_node=4))


def test_fp8_is_refused_with_what_it_needs(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match=r"it needs a GPU of compute capability 8\.9 \(Ada, Hopper\) or later"):
        make_recipe({"training.precision": "fp8"})
