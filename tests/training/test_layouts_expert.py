"""Expert parallelism equals one plain PyTorch process, also where a gradient of another scale would show."""

import pytest

from tests.support.equality import Equality, RanksOf

SGD = ("optimizer.type=sgd", "max_grad_norm=0", "learning_rate=0.05")
FAMILIES = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
}


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", [(), SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_mixtral(ranks: int, stage: int, optimizer: tuple[str, ...], ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model("mixtral", **FAMILIES["mixtral"])
    equality.check(ranks_of(ranks), "expert_parallel_size=2", f"zero.stage={stage}", *optimizer, model=model)


@pytest.mark.distributed
def test_qwen3(ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model("qwen3_moe", **FAMILIES["qwen3_moe"])
    equality.check(ranks_of(2), "expert_parallel_size=2", "zero.stage=2", model=model)
