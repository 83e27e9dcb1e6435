"""An optimizer is refused where no test of ours has trained with it, with the reason."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from launcher.errors import PlanError
from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]
FP32 = {"training.precision": "fp32"}
MUON = {**FP32, "optimizer.type": "muon"}
ADAFACTOR = {**FP32, "optimizer.type": "adafactor", "zero.stage": 0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {**ADAFACTOR, "zero.stage": 1},
            "adafactor does not train under ZeRO stage 1: the stages above it flatten the weights, and Adafactor's "
            "second moments are those of rows and columns; set zero.stage to 0",
        ),
        ({**ADAFACTOR, "training.precision": "bf16"}, "adafactor is trained by our tests in fp32 only"),
        (
            {**ADAFACTOR, "parallel.tensor_parallel_size": 2},
            "adafactor is trained by our tests in data parallel runs only; leave parallel out",
        ),
        ({**MUON, "zero.stage": 3}, "muon does not train under ZeRO stage 3: stage 3 refuses it together with"),
        (
            {**MUON, "zero.stage": 2},
            "under ZeRO stage 2 DeepSpeed clips what muon makes of the gradients, not the gradients; set "
            "training.max_grad_norm to 0, or zero.stage to 0",
        ),
        (
            {**MUON, "zero": {"stage": 1, "offload_optimizer": "cpu"}, "training.max_grad_norm": 0},
            "muon is not offloaded by a test of ours; leave zero.offload_optimizer out",
        ),
        ({"optimizer.type": "lion", "training.precision": "fp16"}, "lion is trained by our tests in bf16 or fp32 only"),
        (
            {"optimizer.type": "adamw_8bit"},
            "adamw_8bit is not trained by a test of ours: its states are bitsandbytes', whose blocks of 2048 elements "
            "ZeRO would cut, and which computes on GPUs; set it to one of adamw, sgd, adafactor, muon, lion",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(str(item) for item in value.values()),
)
def test_it_is_refused(make_recipe: MakeRecipe, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=re.escape(f"optimizer.type: {message}")):
        make_plan(make_recipe(changes), Resources(workers_per_node=2))


def test_what_deepspeed_gets(make_recipe: MakeRecipe) -> None:
    changes = {**MUON, "zero.stage": 0, "optimizer.adam_learning_rate": 0.001, "optimizer.weight_decay": 0.1}
    plan = make_plan(make_recipe(changes), Resources(workers_per_node=2))
    assert plan.deepspeed_config["optimizer"] == {
        "type": "Muon",
        "params": {
            "lr": 3e-4, "adam_lr": 0.001, "weight_decay": 0.1, "momentum": 0.95, "betas": [0.9, 0.95], "eps": 1e-8,
            "torch_adam": True,
        },
    }  # fmt: skip
    assert any("optimizer.type = 'Muon' is not counted" in note for note in plan.notes)
