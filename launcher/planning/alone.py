"""A recipe on one worker, whole and in fp32: to ask its model for something outside of a run."""

from typing import Literal

from launcher.planning.layout import Resources
from launcher.planning.plan import Plan, make_plan
from launcher.recipe.layout_sections import ParallelSection, ZeroSection
from launcher.recipe.schema import Recipe


def plan_alone(recipe: Recipe, micro_batch_size: int, device: Literal["cpu", "cuda"] = "cpu") -> Plan:
    """Plan a recipe for one process that holds the whole model in fp32 and trains nothing.

    What only training needs is left out: a teacher, disturbed inputs, tiles, DeepSpeed's own settings.
    """
    training = recipe.training.model_copy(
        update={"precision": "fp32", "global_batch_size": None, "gradient_accumulation_steps": None,
                "micro_batch_size": micro_batch_size, "gradient_checkpointing": False,
                "torch_compile": False, "mlp_tiles": 1, "loss_tiles": 1}
    )  # fmt: skip
    update = {
        "training": training,
        "parallel": ParallelSection(),
        "zero": ZeroSection(stage=0),
        "distillation": None,
        "deepspeed": recipe.deepspeed.model_copy(update={"config": None, "overrides": {}}),
    }
    return make_plan(recipe.model_copy(update=update), Resources(nodes=1, workers_per_node=1, device=device))
