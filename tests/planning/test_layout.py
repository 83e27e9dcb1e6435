import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import PlanError
from launcher.planning.layout import (
    AXES,
    BatchPlan,
    Layout,
    Resources,
    divisors,
    make_batch,
    make_layout,
    resize_batch,
)
from launcher.recipe.schema import Recipe

MakeRecipe = Callable[..., Recipe]

BATCH_FIELDS = ("micro_batch_size", "gradient_accumulation_steps", "global_batch_size")


def layout_of(replicas: int) -> Layout:
    return Layout(world_size=replicas, data_parallel_size=replicas)


def batch_of(make_recipe: MakeRecipe, replicas: int, *sizes: int | None) -> BatchPlan:
    changes = {f"training.{field}": size for field, size in zip(BATCH_FIELDS, sizes, strict=True)}
    return make_batch(make_recipe(changes), layout_of(replicas))


def test_what_is_left_of_the_world_size_is_data_parallel(make_recipe: MakeRecipe) -> None:
    layout = make_layout(make_recipe(), Resources(nodes=2, workers_per_node=3))
    assert layout == Layout(world_size=6, data_parallel_size=6)


def test_sizes_that_do_not_multiply_are_told_with_those_that_do(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"parallel.tensor_parallel_size": 3, "parallel.pipeline_parallel_size": 2})
    message = (
        "parallel: tensor_parallel_size 3 x pipeline_parallel_size 2 = 6 does not divide the world size 8; "
        "make the product one of 1, 2, 4, 8"
    )
    with pytest.raises(PlanError, match=re.escape(message)):
        make_layout(recipe, Resources(nodes=2, workers_per_node=4))


def test_expert_groups_lie_inside_data_parallel(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe({"parallel.expert_parallel_size": 4})
    message = (
        "parallel.expert_parallel_size: 4 does not divide the data-parallel size 6, inside which expert groups lie; "
        "set it to one of 1, 2, 3, 6"
    )
    with pytest.raises(PlanError, match=re.escape(message)):
        make_layout(recipe, Resources(workers_per_node=6))


SIZES = st.integers(1, 4)


@given(pipeline=SIZES, data=SIZES, sequence=SIZES, tensor=SIZES)
def test_coordinates_name_each_rank_once(pipeline: int, data: int, sequence: int, tensor: int) -> None:
    layout = Layout(
        world_size=pipeline * data * sequence * tensor,
        data_parallel_size=data,
        pipeline_parallel_size=pipeline,
        sequence_parallel_size=sequence,
        tensor_parallel_size=tensor,
    )
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    assert [layout.rank(place) for place in places] == list(range(layout.world_size))
    assert len(set(places)) == layout.world_size
    for axis in AXES:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
        assert {len(group) for group in groups} == {layout.size(axis)}


def test_tensor_groups_are_neighbours_and_pipeline_groups_are_far_apart() -> None:
    layout = Layout(world_size=8, data_parallel_size=2, pipeline_parallel_size=2, tensor_parallel_size=2)
    assert layout.groups("tensor") == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert layout.groups("data") == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert layout.groups("pipeline") == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_a_layout_checks_its_own_product() -> None:
    with pytest.raises(ValueError, match="do not multiply"):
        Layout(world_size=8, data_parallel_size=2, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2, 4, None), (2, 4, 24)),
        ((2, None, 24), (2, 4, 24)),
        ((None, 4, 24), (2, 4, 24)),
        ((2, 4, 24), (2, 4, 24)),
        ((2, None, None), (2, 1, 6)),
        ((None, None, 24), (8, 1, 24)),
    ],
)
def test_two_sizes_give_the_third(
    make_recipe: MakeRecipe, sizes: tuple[int | None, ...], expected: tuple[int, int, int]
) -> None:
    batch = batch_of(make_recipe, 3, *sizes)
    assert (batch.micro_batch_size, batch.gradient_accumulation_steps, batch.global_batch_size) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((None, None, None), "no batch size is set; set micro_batch_size or global_batch_size"),
        ((None, 4, None), "only gradient_accumulation_steps (4) is set; set micro_batch_size or global_batch_size"),
        (
            (2, 4, 25),
            "25 contradicts micro_batch_size 2 x gradient_accumulation_steps 4 x data-parallel size 3 = 24; "
            "set global_batch_size to 24, or leave one of the three out",
        ),
        (
            (2, 4, 48),
            "48 contradicts micro_batch_size 2 x gradient_accumulation_steps 4 x data-parallel size 3 = 24; set "
            "global_batch_size to 24, or gradient_accumulation_steps to 8, or micro_batch_size to 4, or leave one of "
            "the three out",
        ),
        (
            (4, None, 30),
            "30 is not a multiple of micro_batch_size 4 x data-parallel size 3 = 12; set global_batch_size to 24 or "
            "36, or micro_batch_size to a divisor of 10: 1, 2, 5, 10",
        ),
        (
            (None, 4, 30),
            "30 is not a multiple of gradient_accumulation_steps 4 x data-parallel size 3 = 12; set global_batch_size "
            "to 24 or 36, or gradient_accumulation_steps to a divisor of 10: 1, 2, 5, 10",
        ),
        (
            (None, None, 10),
            "10 is not a multiple of gradient_accumulation_steps 1 x data-parallel size 3 = 3; set global_batch_size "
            "to 9 or 12, or use a number of data-parallel workers that divides 10: 1, 2, 5, 10",
        ),
        (
            (8, None, 10),
            "10 is not a multiple of micro_batch_size 8 x data-parallel size 3 = 24; set global_batch_size to 24, or "
            "use a number of data-parallel workers that divides 10: 1, 2, 5, 10",
        ),
    ],
)
def test_contradictions_say_what_would_work(
    make_recipe: MakeRecipe, sizes: tuple[int | None, ...], message: str
) -> None:
    with pytest.raises(PlanError, match=re.escape(f"training.global_batch_size: {message}") + "$"):
        batch_of(make_recipe, 3, *sizes)


@given(micro=st.integers(1, 64), accumulation=st.integers(1, 64), replicas=st.integers(1, 64), size=st.integers(1, 512))
def test_resizing_keeps_the_global_batch_and_never_grows_the_micro_batch(
    micro: int, accumulation: int, replicas: int, size: int
) -> None:
    total = micro * accumulation * replicas
    before = BatchPlan(micro_batch_size=micro, gradient_accumulation_steps=accumulation, global_batch_size=total)
    after = resize_batch(before, size)
    if after is None:
        assert total % size
        return
    assert after.micro_batch_size * after.gradient_accumulation_steps * size == total == after.global_batch_size
    assert after.micro_batch_size <= micro
    larger = range(after.micro_batch_size + 1, micro + 1)
    assert not any((total // size) % candidate == 0 for candidate in larger)


@given(st.integers(1, 5000))
def test_divisors_are_all_of_them_in_order(number: int) -> None:
    assert divisors(number) == [size for size in range(1, number + 1) if number % size == 0]


def test_resized_resources_keep_the_kind_of_worker() -> None:
    resources = Resources(nodes=4, workers_per_node=8, device="cuda")
    assert resources.resized(16) == Resources(nodes=2, workers_per_node=8, device="cuda")
    assert resources.resized(6) == Resources(nodes=1, workers_per_node=6, device="cuda")
    assert resources.resized(7).world_size == 7
