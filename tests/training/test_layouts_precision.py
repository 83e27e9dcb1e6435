"""bf16 and fp16 stay within their rounding of a plain fp32 process, and CPU offload changes nothing.

bf16 has 8 significant bits, fp16 has 11: one rounding is off by up to 0.4 % and 0.05 %. Losses are near 5.
"""

import pytest

from tests.support.equality import Equality, RanksOf
from tests.support.ranks import Ranks

BF16 = {"loss": 2e-2, "norm": 5e-2}
SIXTEEN_BITS = {
    "zero 1": ("zero.stage=1",),
    "zero 2": ("zero.stage=2",),
    "zero 3": ("zero.stage=3",),
    "tensor": ("tensor_parallel_size=2", "zero.stage=1"),
    "sequence": ("sequence_parallel_size=2", "zero.stage=2"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", SIXTEEN_BITS)
def test_bf16(layout: str, ranks_of: RanksOf, equality: Equality) -> None:
    data_parallel = 2 if layout.startswith("zero") else 1
    equality.check(ranks_of(2), "precision=bf16", *SIXTEEN_BITS[layout], data_parallel=data_parallel, **BF16)


@pytest.mark.distributed
def test_fp16_is_refused_where_the_processor_does_not_compute_in_it(one_rank: Ranks) -> None:
    refused = one_rank.call("cases:refusal_of_precision", precision="fp16", supported=False)[0]
    assert refused == (
        "recipe: 1 problem\n  training.precision: this processor does not compute in fp16; set it to fp32 or bf16"
    )
    assert one_rank.call("cases:refusal_of_precision", precision="fp16", supported=True) == [None]


OFFLOADS = {
    "zero 1 optimizer": ("zero.stage=1", "zero.offload_optimizer=cpu"),
    "zero 2 optimizer": ("zero.stage=2", "zero.offload_optimizer=cpu"),
    "zero 3 optimizer": ("zero.stage=3", "zero.offload_optimizer=cpu"),
    "zero 3 both": ("zero.stage=3", "zero.offload_optimizer=cpu", "zero.offload_param=cpu"),
}


@pytest.mark.distributed
@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_to_the_host_changes_nothing(offload: str, ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(2), *OFFLOADS[offload])
