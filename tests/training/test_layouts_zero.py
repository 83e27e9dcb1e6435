"""Every ZeRO stage on one, two and four data-parallel ranks equals one plain PyTorch process."""

import pytest

from tests.support.equality import Equality, RanksOf


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_zero(stage: int, size: int, ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(size), f"zero.stage={stage}")
