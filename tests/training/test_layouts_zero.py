"""Every ZeRO stage on one, two and four data-parallel ranks equals one plain PyTorch process."""

from collections.abc import Callable

import pytest

from launcher.data.store import PreparedData
from launcher.planning.plan import Plan
from launcher.run_directory import RunDirectory
from tests.support.equality import Equality, RanksOf
from tests.support.ranks import Ranks

pytestmark = pytest.mark.matrix

SMALL = ("deepspeed.overrides={zero_optimization: {stage3_param_persistence_threshold: 0}}",)
"""Nothing is so small that it stays whole."""

MakeRun = Callable[..., tuple[RunDirectory, Plan]]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_zero(stage: int, size: int, ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(size), f"zero.stage={stage}")


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_second_copies_of_the_weights_inside_of_a_node(precision: str, ranks_of: RanksOf, equality: Equality) -> None:
    """hpZ: two of the four workers gather from each other in the backward pass."""
    rounding = {"loss": 2e-2, "norm": 5e-2} if precision == "bf16" else {}
    settings = ("zero.stage=3", "zero.hpz_partition_size=2", f"precision={precision}", *SMALL)
    equality.check(ranks_of(4), *settings, **rounding)


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
