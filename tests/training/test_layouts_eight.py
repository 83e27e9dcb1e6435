"""Layouts of eight ranks equal one plain PyTorch process; all of them here, so that the processes start once."""

import pytest

from tests.support.equality import Equality, RanksOf

pytestmark = pytest.mark.matrix

THREE_DIMENSIONS = ("pipeline_parallel_size=2", "tensor_parallel_size=2", "zero.stage=1")


@pytest.mark.distributed
def test_three_dimensions(ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(8), *THREE_DIMENSIONS, model=equality.model(), data_parallel=2)
