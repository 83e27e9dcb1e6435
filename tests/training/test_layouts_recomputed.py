"""Activations that are made again in the backward pass change nothing, in no layout."""

import pytest

from tests.support.equality import MIXTURES, Equality, RanksOf

pytestmark = pytest.mark.matrix

LAYOUTS = {
    "tensor ZeRO 3": ("tensor_parallel_size=2", "zero.stage=3"),
    "ZeRO 0": ("zero.stage=0",),
    "ZeRO 1": ("zero.stage=1",),
    "ZeRO 2": ("zero.stage=2",),
    "ZeRO 3": ("zero.stage=3",),
    "tensor ZeRO 1": ("tensor_parallel_size=2", "zero.stage=1"),
    "sequence ZeRO 2": ("sequence_parallel_size=2", "zero.stage=2"),
    "sequence ZeRO 3": ("sequence_parallel_size=2", "zero.stage=3"),
    "pipeline": ("pipeline_parallel_size=2", "zero.stage=1"),
    "expert": ("expert_parallel_size=2", "zero.stage=1"),
    "pipeline tensor": ("pipeline_parallel_size=2", "tensor_parallel_size=2", "zero.stage=1"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recomputation(layout: str, ranks_of: RanksOf, equality: Equality) -> None:
    data_parallel = 2 if layout.startswith(("ZeRO", "expert")) else 1
    model = equality.model("mixtral", **MIXTURES["mixtral"]) if layout == "expert" else None
    ranks = ranks_of(4 if layout == "pipeline tensor" else 2)
    equality.check(ranks, *LAYOUTS[layout], "gradient_checkpointing=true", model=model, data_parallel=data_parallel)
