"""Layouts of eight ranks equal one plain PyTorch process; all of them here, so that the processes start once."""

import pytest

from tests.support.equality import Equality, RanksOf

pytestmark = pytest.mark.matrix

THREE_DIMENSIONS = ("pipeline_parallel_size=2", "tensor_parallel_size=2", "zero.stage=1")


@pytest.mark.distributed
def test_three_dimensions(ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(8), *THREE_DIMENSIONS, model=equality.model(), data_parallel=2)


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 0, 2, 3])
def test_four_tensor_parallel_ranks_twice(stage: int, ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(8), "tensor_parallel_size=4", f"zero.stage={stage}", data_parallel=2)


@pytest.mark.exhaustive
@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_four_stages_twice(tied: bool, ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model(num_hidden_layers=4, tie_word_embeddings=tied)
    equality.check(ranks_of(8), "pipeline_parallel_size=4", "zero.stage=1", model=model, data_parallel=2)
