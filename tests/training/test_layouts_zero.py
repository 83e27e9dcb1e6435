"""Every ZeRO stage on one, two and four data-parallel ranks equals one plain PyTorch process."""

from collections.abc import Callable

import pytest

from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory
from tests.support.equality import Equality, RanksOf
from tests.support.ranks import Ranks

pytestmark = pytest.mark.matrix

MakeRun = Callable[..., tuple[RunDirectory, Plan]]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_zero(stage: int, size: int, ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(size), f"zero.stage={stage}")


@pytest.mark.distributed
def test_random_weights_do_not_depend_on_the_stage(two_ranks: Ranks, make_run: MakeRun, prepared: PreparedData) -> None:
    sums = []
    for stage in (0, 3):
        directory, _ = make_run(f"zero.stage={stage}", name=f"stage{stage}")
        first, second = two_ranks.call(
            "cases:initial_weights", run_directory=str(directory.path), data=str(prepared.directory)
        )
        assert first == second
        sums.append(first)
    assert sums[0] == sums[1]
    assert sums[0]["model.layers.0.self_attn.q_proj.weight"] != sums[0]["model.layers.1.self_attn.q_proj.weight"]
