"""Sequence parallelism equals one plain PyTorch process, also where a gradient of another scale would show.

Adam and clipping do not see a gradient that is too large everywhere; plain SGD without clipping does.
"""

import pytest

from tests.support.equality import Equality, RanksOf

pytestmark = pytest.mark.matrix

SGD = ("optimizer.type=sgd", "max_grad_norm=0", "learning_rate=0.05")


@pytest.mark.distributed
@pytest.mark.parametrize("optimizer", [(), SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("sequence", "data"), [(2, 1), (2, 2), (4, 1)])
def test_llama(
    sequence: int, data: int, stage: int, optimizer: tuple[str, ...], ranks_of: RanksOf, equality: Equality
) -> None:
    settings = (f"sequence_parallel_size={sequence}", f"zero.stage={stage}", *optimizer)
    equality.check(ranks_of(sequence * data), *settings, data_parallel=data)


@pytest.mark.distributed
@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3", "gemma"])
def test_families(model_type: str, ranks_of: RanksOf, equality: Equality) -> None:
    changes = {"head_dim": 8} if model_type in ("qwen3", "gemma") else {}
    model = equality.model(model_type, **changes)
    equality.check(ranks_of(2), "sequence_parallel_size=2", "zero.stage=2", model=model, data_parallel=1)


@pytest.mark.distributed
def test_a_sliding_window_holds_across_ranks(ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model("mistral", sliding_window=8)
    equality.check(ranks_of(2), "sequence_parallel_size=2", "zero.stage=2", model=model, data_parallel=1)


@pytest.mark.distributed
def test_more_ranks_than_key_value_heads(ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model(num_key_value_heads=2)
    equality.check(ranks_of(4), "sequence_parallel_size=4", "zero.stage=3", model=model, data_parallel=1)
