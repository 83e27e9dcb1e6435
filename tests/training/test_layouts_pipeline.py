"""Pipeline parallelism equals one plain PyTorch process: tied and untied embeddings, and with tensor parallelism."""

import pytest

from tests.support.equality import Equality, RanksOf

pytestmark = pytest.mark.matrix

FAMILIES = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8},
    "smollm3": {},
}


@pytest.mark.distributed
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("pipeline", "data"), [(2, 1), (2, 2), (4, 1)])
def test_llama(pipeline: int, data: int, tied: bool, ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model(num_hidden_layers=4, tie_word_embeddings=tied)
    settings = (f"pipeline_parallel_size={pipeline}", "zero.stage=1")
    equality.check(ranks_of(pipeline * data), *settings, model=model, data_parallel=data)


@pytest.mark.distributed
@pytest.mark.parametrize("model_type", FAMILIES)
def test_families(model_type: str, ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model(model_type, **FAMILIES[model_type])
    attention = "eager" if model_type == "gemma2" else "sdpa"  # all that transformers has for it
    settings = ("pipeline_parallel_size=2", "zero.stage=1", f"attn_implementation={attention}")
    equality.check(ranks_of(2), *settings, model=model, data_parallel=1)


@pytest.mark.distributed
def test_activation_checkpointing_and_stages_of_equal_time(ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model(num_hidden_layers=4)
    settings = ("gradient_checkpointing=true", "parallel.pipeline_partition=time", "zero.stage=1")
    equality.check(ranks_of(2), "pipeline_parallel_size=2", *settings, model=model, data_parallel=1)


@pytest.mark.distributed
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tensor_parallel_stages(tied: bool, model_type: str, ranks_of: RanksOf, equality: Equality) -> None:
    model = equality.model(model_type, tie_word_embeddings=tied)
    settings = ("pipeline_parallel_size=2", "tensor_parallel_size=2", "zero.stage=1")
    equality.check(ranks_of(4), *settings, model=model, data_parallel=1)
