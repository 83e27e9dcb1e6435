"""The recipes of `recipes/parallel` are plans that fit the cluster that each one names."""

import pytest

from launcher.planning.layout import Resources
from launcher.planning.plan import make_plan
from launcher.recipe.catalogue import recipe_names
from launcher.recipe.loading import load_recipe

H100_BYTES = 80e9
CPU = {
    "tensor": 2,
    "sequence": 2,
    "pipeline": 2,
    "zero3-offload": 2,
    "expert": 2,
    "three-dimensions": 8,
}
GPU_NODES = {"llama3-8b": 1, "llama3-70b": 4, "llama3-405b": 128, "mixtral-8x7b": 4}
PARAMETERS = {"llama3-8b": 8.03e9, "llama3-70b": 70.6e9, "llama3-405b": 405.9e9, "mixtral-8x7b": 46.7e9}
"""As the models' own pages give them."""


def test_every_recipe_is_planned_here() -> None:
    names = {name.removeprefix("parallel/") for name in recipe_names() if name.startswith("parallel/")}
    assert names == {*CPU, *GPU_NODES, "llama3-8b-one-gpu"}


@pytest.mark.parametrize("name", CPU)
def test_small_recipes_are_planned_for_cpus(name: str) -> None:
    plan = make_plan(load_recipe(f"parallel/{name}"), Resources(workers_per_node=CPU[name]))
    assert plan.batch.gradient_accumulation_steps > 1
    assert plan.ranks is not None


@pytest.mark.parametrize("name", GPU_NODES)
def test_real_recipes_fit_their_cluster(name: str) -> None:
    resources = Resources(nodes=GPU_NODES[name], workers_per_node=8, device="cuda")
    plan = make_plan(load_recipe(f"parallel/{name}"), resources)
    assert plan.model is not None
    assert plan.model.num_parameters == pytest.approx(PARAMETERS[name], rel=2e-3)
    assert plan.ranks is not None
    assert max(rank.device_bytes for rank in plan.ranks) < H100_BYTES


def test_eight_billion_parameters_fit_one_gpu_with_offload() -> None:
    plan = make_plan(load_recipe("parallel/llama3-8b-one-gpu"), Resources(device="cuda"))
    assert plan.ranks is not None
    assert max(rank.device_bytes for rank in plan.ranks) < H100_BYTES
    assert max(rank.host_bytes for rank in plan.ranks) < 200e9
