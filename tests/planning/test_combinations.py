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
TRAINING_TESTS = Path(__file__).parents[1] / "training"


def refused(recipe: Recipe, message: str, workers: int = 4) -> None:
    with pytest.raises(PlanError, match=re.escape(message)):
        make_plan(recipe, Resources(workers_per_node=workers))


@pytest.mark.parametrize("row", COMBINATIONS, ids=lambda row: "+".join(sorted(row.groups)) or "data")
def test_each_row_names_a_test_that_is_there(row: object) -> None:
    assert (TRAINING_TESTS / row.test).is_file()  # type: ignore[attr-defined]


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
