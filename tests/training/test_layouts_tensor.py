"""Tensor parallelism equals one plain PyTorch process: every ZeRO stage, every family, tied and untied."""

import pytest

from tests.support.equality import Equality, RanksOf

pytestmark = pytest.mark.matrix


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("tensor", "data"), [(2, 1), (2, 2), (4, 1)])
def test_llama(tensor: int, data: int, stage: int, ranks_of: RanksOf, equality: Equality) -> None:
    equality.check(ranks_of(tensor * data), f"tensor_parallel_size={tensor}", f"zero.stage={stage}", data_parallel=data)


FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama uneven vocabulary": ("llama", {"vocab_size": 325}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3 tied": ("qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": ("gemma2", {"head_dim": 8}),
    "gemma3": ("gemma3_text", {"head_dim": 8}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {}),
}


@pytest.mark.distributed
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, ranks_of: RanksOf, equality: Equality) -> None:
    model_type, changes = FAMILIES[family]
    model = equality.model(model_type, **changes)
    attention = "eager" if model_type == "gemma2" else "sdpa"  # all that transformers has for it
    settings = ("tensor_parallel_size=2", "zero.stage=1", f"attn_implementation={attention}")
    equality.check(ranks_of(2), *settings, model=model, data_parallel=1)
