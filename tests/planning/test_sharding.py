import math
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.planning.families import FAMILIES, list_parameters
from launcher.planning.layout import Layout
from launcher.planning.sharding import shard, stage_borders
from tests.support.ranks import Ranks
from tests.support.small_models import small

DIVIDED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "smollm3", "starcoder2")
"""Families that AutoTP divides; tied embeddings where it can."""


def layout(tensor: int = 1, pipeline: int = 1, expert: int = 1, data: int = 1) -> Layout:
    return Layout(
        world_size=tensor * pipeline * data,
        data_parallel_size=data,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
        expert_parallel_size=expert,
    )


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("shards"))
    yield ranks
    ranks.close()


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", DIVIDED)
def test_the_shard_is_what_deepspeed_leaves_on_a_rank(two_ranks: Ranks, family: str, tied: bool) -> None:
    if tied and family.startswith("gemma"):
        tied = False  # AutoTP cannot divide an embedding that scales its output
    config = small(family, tie_word_embeddings=tied)
    (stage,) = shard(list_parameters(config), layout(tensor=2))
    planned = {tensor.name: list(tensor.shape) for tensor in stage.parameters}
    for shapes in two_ranks.call("tests.support.shards:tensor_parallel_shapes", config=config, ranks=2):
        assert shapes == planned


@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_holds_the_whole_model_in_its_order(family: str) -> None:
    parameters = list_parameters(small(family))
    (stage,) = shard(parameters, layout())
    assert list(stage.parameters) == parameters
    assert stage.has_head


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_hold_the_model_between_them(family: str, tied: bool, stages: int) -> None:
    parameters = list_parameters(small(family, tie_word_embeddings=tied, num_hidden_layers=5) | {"n_layer": 5})
    held = shard(parameters, layout(pipeline=stages))
    assert len(held) == stages
    assert [stage.has_head for stage in held] == [False] * (stages - 1) + [True]
    names = [tensor.name for stage in held for tensor in stage.parameters]
    twice = {name for name in names if names.count(name) > 1}
    assert set(names) == {tensor.name for tensor in parameters}
    assert len(twice) == (1 if tied else 0)  # a tied embedding is on the first and on the last stage
    assert all(stage.num_layers >= 1 for stage in held)


def test_experts_are_divided_among_the_ranks_of_an_expert_group() -> None:
    parameters = list_parameters(small("mixtral"))
    (whole,), (part,) = shard(parameters, layout(data=4)), shard(parameters, layout(data=4, expert=2))
    assert part.dense == whole.dense
    assert 2 * sum(tensor.numel for tensor in part.experts) == sum(tensor.numel for tensor in whole.experts)
    assert part.num_sparse_layers == whole.num_sparse_layers == 3


def test_a_head_that_is_not_divided() -> None:
    parameters = list_parameters(small("llama"))
    (stage,) = shard(parameters, layout(tensor=2), vocabulary_parallel=False)
    assert {tensor.shape for tensor in stage.parameters if tensor.role in ("head", "embedding")} == {(1000, 64)}


@given(
    layers=st.lists(st.integers(1, 1000), min_size=1, max_size=40),
    before=st.integers(0, 3000),
    after=st.integers(0, 3000),
    data=st.data(),
)
def test_borders_cut_all_layers_into_stages(layers: list[int], before: int, after: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(layers)))
    borders = stage_borders(layers, before, after, stages)
    assert (borders[0], borders[-1], len(borders)) == (0, len(layers), stages + 1)
    assert all(first < end for first, end in pairwise(borders))


@pytest.mark.parametrize(("number", "stages"), [(80, 4), (126, 16), (32, 8), (7, 3)])
def test_equal_layers_make_nearly_equal_stages(number: int, stages: int) -> None:
    borders = stage_borders([10] * number, 0, 0, stages)
    sizes = [end - first for first, end in pairwise(borders)]
    assert max(sizes) <= math.ceil(number / stages)
    assert min(sizes) >= number // stages


def test_embedding_and_head_count_for_the_first_and_last_stage() -> None:
    assert stage_borders([10] * 12, 20, 40, 3) == [0, 4, 10, 12]


@pytest.mark.parametrize("stages", [0, 4])
def test_more_stages_than_layers_are_refused(stages: int) -> None:
    with pytest.raises(ValueError, match="3 layers cannot be cut"):
        stage_borders([1, 1, 1], 0, 0, stages)
