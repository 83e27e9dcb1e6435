"""Expert parallelism equals one plain PyTorch process, also where a gradient of another scale would show."""

import pytest

from tests.support.equality import MIXTURES, Equality, RanksOf

pytestmark = pytest.mark.matrix

SGD = ("optimizer.type=sgd", "max_grad_norm=0", "learning_rate=0.05")


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", [(), SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("ranks", "experts"), [(2, 2), (4, 2), (4, 4)])
def test_mixtral(
    ranks: int, experts: int, stage: int, optimizer: tuple[str, ...], ranks_of: RanksOf, equality: Equality
) -> None:
    model = equality.model("mixtral", **MIXTURES["mixtral"])
    settings = (f"expert_parallel_size={experts}", f"zero.stage={stage}", *optimizer)
    equality.check(ranks_of(ranks), *settings, model=model)


@pytest.mark.distributed
@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_families(family: str, ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model(family, **MIXTURES[family])
    equality.check(ranks_of(2), "expert_parallel_size=2", "zero.stage=2", model=model)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["expert_parallel_size=2", "expert_parallel_size=1"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_routers_that_are_balanced(layout: str, checkpointing: bool, ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model("mixtral", **MIXTURES["mixtral"])
    recomputes = f"gradient_checkpointing={str(checkpointing).lower()}"
    equality.check(ranks_of(2), layout, "zero.stage=2", "router_aux_loss_coef=0.3", recomputes, model=model)
