"""MLPs and loss in parts of the sequence learn what a plain process does, also where another scale would show."""

import pytest

from tests.support.equality import Equality, RanksOf

pytestmark = pytest.mark.matrix

TILES = ("mlp_tiles=3", "loss_tiles=4")
SGD = ("optimizer.type=sgd", "max_grad_norm=0", "learning_rate=0.05")


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", [(), SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_llama(stage: int, optimizer: tuple[str, ...], ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(2), *TILES, f"zero.stage={stage}", *optimizer)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [3, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_sequence_parallel(stage: int, checkpointing: bool, ranks_of: RanksOf, equality: Equality) -> None:
    settings = (*TILES, "sequence_parallel_size=2", f"zero.stage={stage}", f"gradient_checkpointing={checkpointing}")
    equality.check(ranks_of(2), *settings, data_parallel=1)


@pytest.mark.distributed
@pytest.mark.parametrize("model_type", ["qwen3", "mistral", "qwen2", "gemma"])
def test_families(model_type: str, ranks_of: RanksOf, equality: Equality) -> None:
    changes = {"head_dim": 8, "tie_word_embeddings": False} if model_type in ("qwen3", "gemma") else {}
    equality.check(ranks_of(2), *TILES, "zero.stage=2", model=equality.model(model_type, **changes))


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 0])
def test_tied(stage: int, ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model(tie_word_embeddings=True)
    equality.check(ranks_of(2), *TILES, f"zero.stage={stage}", model=model)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_bf16(stage: int, ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(2), *TILES, "precision=bf16", f"zero.stage={stage}", loss=2e-2, norm=5e-2)
