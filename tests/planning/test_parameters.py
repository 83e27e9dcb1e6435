"""The planner's parameters against transformers' own models, built on torch's meta device: names, shapes and order."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from launcher.planning.families import FAMILIES, list_parameters, resolve
from launcher.planning.model_shape import model_shape

transformers.logging.set_verbosity_error()

DEFAULTS = {"num_hidden_layers": 2}
"""The family's defaults, but for the depth, to save time: `test_defaults_...` compares that too."""

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ROTARY = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}
MOE = {**ROTARY, "num_experts": 6, "moe_intermediate_size": 24, "num_experts_per_tok": 3}
QWEN_MOE = [
    {},
    {"decoder_sparse_step": 2},
    {"mlp_only_layers": [0, 2]},
    {"tie_word_embeddings": True, "num_experts": 0},
]

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "llama": [
        ROTARY,
        {**ROTARY, "attention_bias": True, "mlp_bias": True},
        {**ROTARY, "head_dim": 12, "tie_word_embeddings": True},
        {**SMALL, "intermediate_size": 48, "num_key_value_heads": None},
    ],
    "mistral": [ROTARY, {**ROTARY, "head_dim": 12, "tie_word_embeddings": True}],
    "qwen2": [ROTARY, {**ROTARY, "tie_word_embeddings": True}, {**ROTARY, "head_dim": 12}],
    "qwen3": [ROTARY, {**ROTARY, "attention_bias": True, "head_dim": 12, "tie_word_embeddings": True}],
    "gemma": [ROTARY, {**ROTARY, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": False}],
    "gemma2": [ROTARY, {**ROTARY, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": False}],
    "gemma3_text": [ROTARY, {**ROTARY, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": False}],
    "phi3": [ROTARY, {**ROTARY, "num_key_value_heads": None, "tie_word_embeddings": True}],
    "olmo2": [ROTARY, {**ROTARY, "attention_bias": True, "tie_word_embeddings": True}],
    "olmo3": [ROTARY, {**ROTARY, "attention_bias": True, "tie_word_embeddings": True}],
    "smollm3": [ROTARY, {**ROTARY, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}],
    "granite": [ROTARY, {**ROTARY, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "starcoder2": [ROTARY, {**ROTARY, "use_bias": False, "tie_word_embeddings": False}],
    "mixtral": [
        {**ROTARY, "num_local_experts": 3},
        {**ROTARY, "num_experts": 5, "head_dim": 12, "tie_word_embeddings": True},
    ],
    "qwen2_moe": [
        *({**MOE, "shared_expert_intermediate_size": 40, **more} for more in QWEN_MOE),
        {**MOE, "qkv_bias": False},
    ],
    "qwen3_moe": [
        *({**MOE, **more} for more in QWEN_MOE),
        {**ROTARY, "num_local_experts": 4, "moe_intermediate_size": 24, "head_dim": 12, "attention_bias": True},
    ],
    "gpt2": [
        SMALL,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "n_inner": 50, "vocab_size": 64},
        {**SMALL, "intermediate_size": 99, "max_position_embeddings": 40, "tie_word_embeddings": False},
    ],
    "gpt_neox": [
        {**SMALL, "intermediate_size": 48},
        {**SMALL, "intermediate_size": 48, "attention_bias": False, "tie_word_embeddings": True},
    ],
    "opt": [
        {**SMALL, "ffn_dim": 48},
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
        {**SMALL, "ffn_dim": 48, "enable_bias": False, "layer_norm_elementwise_affine": False},
        {**SMALL, "word_embed_proj_dim": 32, "_remove_final_layer_norm": True, "tie_word_embeddings": False},
    ],
    "mpt": [
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 40},
        {**SMALL, "expansion_ratio": 2, "tie_word_embeddings": False},
    ],
}

PUBLISHED: list[tuple[str, dict[str, Any], int]] = [
    # The number of parameters of each repository's safetensors files, as the hub's model page shows it.
    (
        "Llama-3-8B",
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        8_030_261_248,
    ),
    (
        "Llama-3-70B",
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
         "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
        70_553_706_496,
    ),
    (
        "Llama-3.1-405B",
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
         "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8},
        405_853_388_800,
    ),
    ("Mistral-7B-v0.1", {"model_type": "mistral"}, 7_241_732_096),
    ("Mixtral-8x7B", {"model_type": "mixtral"}, 46_702_792_704),
    (
        "SmolLM2-135M",
        {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        134_515_008,
    ),
    (
        "Qwen2.5-7B",
        {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
         "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
        7_615_616_512,
    ),
    (
        "Qwen3-8B",
        {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
         "num_attention_heads": 32, "num_key_value_heads": 8},
        8_190_735_360,
    ),
    (
        "Qwen3-30B-A3B",
        {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
         "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128},
        30_532_122_624,
    ),
    ("Gemma-7B", {"model_type": "gemma"}, 8_537_680_896),
    ("Gemma-2-2B", {"model_type": "gemma2"}, 2_614_341_888),
    ("Phi-3-mini", {"model_type": "phi3"}, 3_821_079_552),
    ("GPT-2", {"model_type": "gpt2"}, 124_439_808),
]  # fmt: skip


def transformers_parameters(config: dict[str, Any]) -> list[tuple[str, tuple[int, ...]]]:
    fields = dict(config)
    built = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(built)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]


def cases() -> list[Any]:
    return [
        pytest.param({"model_type": model_type, **fields}, id=f"{model_type}-{index}")
        for model_type in FAMILIES
        for index, fields in enumerate([DEFAULTS, *VARIANTS[model_type]])
    ]


def test_every_family_has_variants() -> None:
    assert set(VARIANTS) == set(FAMILIES)
    assert len(cases()) >= 60


@pytest.mark.parametrize("config", cases())
def test_names_shapes_and_order_are_those_of_transformers(config: dict[str, Any]) -> None:
    ours = [(tensor.name, tensor.shape) for tensor in list_parameters(config)]
    theirs = transformers_parameters(config)
    assert ours == theirs
    shape = model_shape(config)
    assert shape is not None
    assert shape.num_parameters == sum(torch.Size(size).numel() for _, size in theirs)


@pytest.mark.parametrize(("config", "count"), [pytest.param(c, n, id=name) for name, c, n in PUBLISHED])
def test_published_counts(config: dict[str, Any], count: int) -> None:
    shape = model_shape(config)
    assert shape is not None
    assert shape.num_parameters == count


def test_the_largest_published_models_equal_transformers_too() -> None:
    for _, config, count in PUBLISHED[:5]:
        assert sum(torch.Size(size).numel() for _, size in transformers_parameters(config)) == count


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    family, theirs = FAMILIES[model_type], transformers.AutoConfig.for_model(model_type)
    spelt = {ours: native for native, ours in family.aliases.items()}
    for name, value in resolve(family, {}).items():
        if name == "head_dim" and getattr(theirs, "head_dim", None) is None:
            assert value == theirs.hidden_size // theirs.num_attention_heads
        elif name == "num_key_value_heads" and not hasattr(theirs, name):
            assert value == theirs.num_attention_heads
        elif name == "mlp_only_layers":
            assert not value
            assert not theirs.mlp_only_layers
        elif name == "word_embed_proj_dim":
            assert theirs.word_embed_proj_dim == theirs.hidden_size
        else:
            assert value == getattr(theirs, spelt.get(name, name)), name


def test_the_list_of_fields_is_that_of_the_installed_transformers() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import generate_model_config_fields as generator
    finally:
        sys.path.pop(0)
    assert json.loads(generator.TARGET.read_text()) == json.loads(generator.render())
