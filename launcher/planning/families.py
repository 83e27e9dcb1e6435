"""The model families that the planner can count, with transformers 5.23's defaults of the fields that matter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from launcher.planning.parameters import (
    FOUR_NORMS,
    POST_NORMS,
    ParameterTensor,
    Tensors,
    Values,
    gpt2,
    gpt_neox,
    llama_like,
    mixtral_mlp,
    mpt,
    opt,
    phi3,
    qwen2_moe_mlp,
    qwen3_moe_mlp,
    starcoder2_mlp,
)


@dataclass(frozen=True)
class Family:
    """What the planner knows of one `model_type`.

    Attributes:
        tensors: lists the parameters, in transformers' order.
        defaults: transformers' defaults of the fields that matter to shapes; `None` for `head_dim` and
            `num_key_value_heads` means what it means to transformers: from the hidden size, and as many as heads.
        aliases: the family's own spelling of a field -> the name used here.
        inner_size: width of the MLP.
        heads_divide_hidden: transformers refuses a hidden size that is no multiple of the heads.
        only: fields whose other values are not described here.
    """

    tensors: Tensors
    defaults: Values
    aliases: Mapping[str, str] = field(default_factory=dict)
    inner_size: Callable[[Values], int] = lambda c: int(c["intermediate_size"])
    heads_divide_hidden: bool = False
    only: Values = field(default_factory=dict)


def _decoder(
    vocab: int,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    positions: int,
    *,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """Defaults of a family with rotary positions."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        **more,
    }


_BIAS: dict[str, Any] = {"attention_bias": False}
_BIASES: dict[str, Any] = {"attention_bias": False, "mlp_bias": False}
_QWEN_MOE: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": None}

FAMILIES: dict[str, Family] = {
    "llama": Family(llama_like(), _decoder(32000, 4096, 11008, 32, 32, 2048, **_BIASES), heads_divide_hidden=True),
    "mistral": Family(
        llama_like(qkv_bias=False, output_bias=False), _decoder(32000, 4096, 14336, 32, 32, 131072, kv_heads=8)
    ),
    "qwen2": Family(
        llama_like(qkv_bias=True, output_bias=False), _decoder(151936, 4096, 22016, 32, 32, 32768, kv_heads=32)
    ),
    "qwen3": Family(
        llama_like(qk_norm="head"), _decoder(151936, 4096, 22016, 32, 32, 32768, kv_heads=32, head_dim=128, **_BIAS)
    ),
    "gemma": Family(
        llama_like(), _decoder(256000, 3072, 24576, 28, 16, 8192, kv_heads=16, head_dim=256, tied=True, **_BIAS)
    ),
    "gemma2": Family(
        llama_like(norms=FOUR_NORMS),
        _decoder(256000, 2304, 9216, 26, 8, 8192, kv_heads=4, head_dim=256, tied=True, **_BIAS),
        heads_divide_hidden=True,
    ),
    "gemma3_text": Family(
        llama_like(norms=FOUR_NORMS, qk_norm="head"),
        _decoder(262208, 2304, 9216, 26, 8, 131072, kv_heads=4, head_dim=256, tied=True, **_BIAS),
        heads_divide_hidden=True,
    ),
    "phi3": Family(phi3, _decoder(32064, 3072, 8192, 32, 32, 4096)),
    "olmo2": Family(
        llama_like(norms=POST_NORMS, qk_norm="all"), _decoder(50304, 4096, 11008, 32, 32, 2048, **_BIAS)
    ),
    "olmo3": Family(
        llama_like(norms=POST_NORMS, qk_norm="all"), _decoder(50304, 4096, 11008, 32, 32, 2048, **_BIAS)
    ),
    "smollm3": Family(llama_like(), _decoder(128256, 2048, 11008, 36, 16, 32768, kv_heads=4, tied=True, **_BIASES)),
    "granite": Family(llama_like(), _decoder(32000, 4096, 11008, 32, 32, 2048, **_BIASES)),
    "starcoder2": Family(
        llama_like(qkv_bias="use_bias", output_bias="use_bias", norm_bias=True, mlp=starcoder2_mlp),
        _decoder(49152, 3072, 12288, 30, 24, 4096, kv_heads=2, tied=True, use_bias=True),
    ),
    "mixtral": Family(
        llama_like(qkv_bias=False, output_bias=False, mlp=mixtral_mlp),
        _decoder(32000, 4096, 14336, 32, 32, 131072, kv_heads=8, num_experts=8, num_experts_per_tok=2),
        aliases={"num_local_experts": "num_experts"},
    ),
    "qwen2_moe": Family(
        llama_like(qkv_bias="qkv_bias", output_bias=False, mlp=qwen2_moe_mlp),
        _decoder(
            151936, 2048, 5632, 24, 16, 32768,
            kv_heads=16, qkv_bias=True, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=1408,
            shared_expert_intermediate_size=5632, **_QWEN_MOE,
        ),
    ),
    "qwen3_moe": Family(
        llama_like(qk_norm="head", mlp=qwen3_moe_mlp),
        _decoder(
            151936, 2048, 6144, 24, 32, 32768,
            kv_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, **_BIAS, **_QWEN_MOE,
        ),
        aliases={"num_local_experts": "num_experts"},
    ),
    "gpt2": Family(
        gpt2,
        {
            "vocab_size": 50257, "hidden_size": 768, "n_inner": None, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 1024, "tie_word_embeddings": True,
        },
        aliases={
            "n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
            "n_positions": "max_position_embeddings",
        },
        inner_size=lambda c: int(c["n_inner"] or 4 * c["hidden_size"]),
        heads_divide_hidden=True,
        only={"add_cross_attention": False},
    ),
    "gpt_neox": Family(
        gpt_neox,
        {
            "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
            "num_attention_heads": 64, "max_position_embeddings": 2048, "tie_word_embeddings": False,
            "attention_bias": True,
        },
        heads_divide_hidden=True,
    ),
    "opt": Family(
        opt,
        {
            "vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12,
            "num_attention_heads": 12, "max_position_embeddings": 2048, "tie_word_embeddings": True,
            "word_embed_proj_dim": None, "do_layer_norm_before": True, "_remove_final_layer_norm": False,
            "enable_bias": True, "layer_norm_elementwise_affine": True,
        },
        inner_size=lambda c: int(c["ffn_dim"]),
        heads_divide_hidden=True,
    ),
    "mpt": Family(
        mpt,
        {
            "vocab_size": 50368, "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
            "max_position_embeddings": 2048, "tie_word_embeddings": True,
        },
        aliases={
            "d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
            "max_seq_len": "max_position_embeddings",
        },
        inner_size=lambda c: 4 * int(c["hidden_size"]),
        heads_divide_hidden=True,
    ),
}  # fmt: skip
"""By `model_type`. A family is added with a row here; the tests compare each row with transformers."""


def resolve(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a config with the family's defaults, under the names used here.

    Fields that do not matter to shapes are left out. Values are taken as they are: `invalid_values` tells the wrong
    ones.
    """
    values = dict(family.defaults)
    for key, value in config.items():
        name = family.aliases.get(key, key)
        if name in values:
            values[name] = value
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = values["num_attention_heads"]
    if values.get("head_dim") is None and not invalid_values(family, config):
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
    return values


def invalid_values(family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    """Fields of a config whose type cannot be right -> what they must be."""
    wrong = {}
    for key, value in config.items():
        name = family.aliases.get(key, key)
        if name not in family.defaults:
            continue
        default = family.defaults[name]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                wrong[key] = "true or false"
        elif name == "mlp_only_layers":
            if value is not None and not (isinstance(value, list | tuple) and all(type(v) is int for v in value)):
                wrong[key] = "a list of layer numbers"
        elif name == "num_experts":
            if not (type(value) is int and value >= 0):
                wrong[key] = "a whole number, 0 for a dense model"
        elif not (type(value) is int and value > 0) and not (value is None and _nullable(name, default)):
            wrong[key] = "a positive whole number"
    return wrong


def list_parameters(config: Mapping[str, Any]) -> list[ParameterTensor]:
    """Every parameter of the model, in transformers' order, tied weights once.

    Raises:
        KeyError: the family is not in `FAMILIES`.
    """
    family = FAMILIES[config["model_type"]]
    return list(family.tensors(resolve(family, config)))


def _nullable(name: str, default: Any) -> bool:
    return default is None or name == "num_key_value_heads"
