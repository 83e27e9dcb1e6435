"""The parameters of a causal language model, tensor by tensor, from its transformers config alone.

Names, shapes and order are those of `AutoModelForCausalLM.from_config(config).named_parameters()` in transformers 5.23;
the tests compare them with a model on torch's meta device. Order matters to ZeRO: its partitions cut through the flat
sequence.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

Values = Mapping[str, Any]
"""A config with every field that matters to shapes, under llama's names."""

Tensors = Callable[[Values], Iterator["ParameterTensor"]]
Role = Literal["embedding", "head", "body", "expert"]


class ParameterTensor(NamedTuple):
    """One parameter of a model.

    Attributes:
        name: as in `named_parameters()`.
        shape: as transformers makes it: experts of a layer lie in one tensor, GPT-2's matrices are transposed.
        role: `embedding` is looked up (tokens, positions), `head` maps to the vocabulary, of `expert` tensors a token
            passes only some experts, the rest is `body`. A tied head is no tensor of its own.
    """

    name: str
    shape: tuple[int, ...]
    role: Role = "body"

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def _linear(name: str, out: int, into: int, bias: bool = False) -> Iterator[ParameterTensor]:
    yield ParameterTensor(f"{name}.weight", (out, into))
    if bias:
        yield ParameterTensor(f"{name}.bias", (out,))


def _norm(name: str, size: int, bias: bool = False) -> Iterator[ParameterTensor]:
    yield ParameterTensor(f"{name}.weight", (size,))
    if bias:
        yield ParameterTensor(f"{name}.bias", (size,))


def _embedding(name: str, rows: int, size: int) -> ParameterTensor:
    return ParameterTensor(f"{name}.weight", (rows, size), "embedding")


def _head(name: str, c: Values, size: int) -> Iterator[ParameterTensor]:
    if not c["tie_word_embeddings"]:
        yield ParameterTensor(f"{name}.weight", (c["vocab_size"], size), "head")


Mlp = Callable[[str, int, Values], Iterator[ParameterTensor]]


def gated_mlp(name: str, layer: int, c: Values) -> Iterator[ParameterTensor]:
    """Gate, up and down projection, as in Llama."""
    yield from _gated(name, c["hidden_size"], c["intermediate_size"], c.get("mlp_bias", False))


def _gated(name: str, hidden: int, inner: int, bias: bool = False) -> Iterator[ParameterTensor]:
    yield from _linear(f"{name}.gate_proj", inner, hidden, bias)
    yield from _linear(f"{name}.up_proj", inner, hidden, bias)
    yield from _linear(f"{name}.down_proj", hidden, inner, bias)


def _experts(name: str, number: int, hidden: int, inner: int) -> Iterator[ParameterTensor]:
    yield ParameterTensor(f"{name}.gate_up_proj", (number, 2 * inner, hidden), "expert")
    yield ParameterTensor(f"{name}.down_proj", (number, hidden, inner), "expert")


def mixtral_mlp(name: str, layer: int, c: Values) -> Iterator[ParameterTensor]:
    """A router and experts in every layer."""
    yield ParameterTensor(f"{name}.gate.weight", (c["num_experts"], c["hidden_size"]))
    yield from _experts(f"{name}.experts", c["num_experts"], c["hidden_size"], c["intermediate_size"])


def _is_sparse(layer: int, c: Values) -> bool:
    dense = layer in (c["mlp_only_layers"] or ())
    return not dense and c["num_experts"] > 0 and (layer + 1) % c["decoder_sparse_step"] == 0


def qwen2_moe_mlp(name: str, layer: int, c: Values) -> Iterator[ParameterTensor]:
    """A router, experts and a shared expert with its gate; some layers dense."""
    if not _is_sparse(layer, c):
        yield from gated_mlp(name, layer, c)
        return
    hidden = c["hidden_size"]
    yield ParameterTensor(f"{name}.gate.weight", (c["num_experts"], hidden))
    yield from _experts(f"{name}.experts", c["num_experts"], hidden, c["moe_intermediate_size"])
    yield from _gated(f"{name}.shared_expert", hidden, c["shared_expert_intermediate_size"])
    yield ParameterTensor(f"{name}.shared_expert_gate.weight", (1, hidden))


def qwen3_moe_mlp(name: str, layer: int, c: Values) -> Iterator[ParameterTensor]:
    """Experts and a router; some layers dense."""
    if not _is_sparse(layer, c):
        yield from gated_mlp(name, layer, c)
        return
    yield from _experts(f"{name}.experts", c["num_experts"], c["hidden_size"], c["moe_intermediate_size"])
    yield ParameterTensor(f"{name}.gate.weight", (c["num_experts"], c["hidden_size"]))


def starcoder2_mlp(name: str, layer: int, c: Values) -> Iterator[ParameterTensor]:
    """Two projections without a gate."""
    yield from _linear(f"{name}.c_fc", c["intermediate_size"], c["hidden_size"], c["use_bias"])
    yield from _linear(f"{name}.c_proj", c["hidden_size"], c["intermediate_size"], c["use_bias"])


PRE_NORMS = ("input_layernorm", "post_attention_layernorm")
POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
FOUR_NORMS = (*PRE_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def llama_like(
    *,
    qkv_bias: str | bool = "attention_bias",
    output_bias: str | bool = "attention_bias",
    qk_norm: Literal["none", "head", "all"] = "none",
    norms: tuple[str, ...] = PRE_NORMS,
    norm_bias: bool = False,
    mlp: Mlp = gated_mlp,
) -> Tensors:
    """Describe a decoder with separate q, k, v and o projections under `model.layers`.

    A bias is given as a constant or as the name of the field that turns it on.
    """

    def tensors(c: Values) -> Iterator[ParameterTensor]:
        hidden = c["hidden_size"]
        queries, keys = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
        bias = c[qkv_bias] if isinstance(qkv_bias, str) else qkv_bias
        out_bias = c[output_bias] if isinstance(output_bias, str) else output_bias
        yield _embedding("model.embed_tokens", c["vocab_size"], hidden)
        for layer in range(c["num_hidden_layers"]):
            attention = f"model.layers.{layer}.self_attn"
            yield from _linear(f"{attention}.q_proj", queries, hidden, bias)
            yield from _linear(f"{attention}.k_proj", keys, hidden, bias)
            yield from _linear(f"{attention}.v_proj", keys, hidden, bias)
            yield from _linear(f"{attention}.o_proj", hidden, queries, out_bias)
            if qk_norm != "none":
                yield from _norm(f"{attention}.q_norm", c["head_dim"] if qk_norm == "head" else queries)
                yield from _norm(f"{attention}.k_norm", c["head_dim"] if qk_norm == "head" else keys)
            yield from mlp(f"model.layers.{layer}.mlp", layer, c)
            for name in norms:
                yield from _norm(f"model.layers.{layer}.{name}", hidden, norm_bias)
        yield from _norm("model.norm", hidden, norm_bias)
        yield from _head("lm_head", c, hidden)

    return tensors


def phi3(c: Values) -> Iterator[ParameterTensor]:
    """Llama with q, k and v in one matrix, and gate and up in another."""
    hidden = c["hidden_size"]
    queries, keys = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    yield _embedding("model.embed_tokens", c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _linear(f"{prefix}.self_attn.o_proj", hidden, queries)
        yield from _linear(f"{prefix}.self_attn.qkv_proj", queries + 2 * keys, hidden)
        yield from _linear(f"{prefix}.mlp.gate_up_proj", 2 * c["intermediate_size"], hidden)
        yield from _linear(f"{prefix}.mlp.down_proj", hidden, c["intermediate_size"])
        for name in PRE_NORMS:
            yield from _norm(f"{prefix}.{name}", hidden)
    yield from _norm("model.norm", hidden)
    yield from _head("lm_head", c, hidden)


def _conv1d(name: str, into: int, out: int) -> Iterator[ParameterTensor]:
    yield ParameterTensor(f"{name}.weight", (into, out))
    yield ParameterTensor(f"{name}.bias", (out,))


def gpt2(c: Values) -> Iterator[ParameterTensor]:
    """GPT-2: learned positions, biases everywhere, matrices stored transposed (`Conv1D`)."""
    hidden = c["hidden_size"]
    inner = c["n_inner"] or 4 * hidden
    yield _embedding("transformer.wte", c["vocab_size"], hidden)
    yield _embedding("transformer.wpe", c["max_position_embeddings"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"transformer.h.{layer}"
        yield from _norm(f"{prefix}.ln_1", hidden, bias=True)
        yield from _conv1d(f"{prefix}.attn.c_attn", hidden, 3 * hidden)
        yield from _conv1d(f"{prefix}.attn.c_proj", hidden, hidden)
        yield from _norm(f"{prefix}.ln_2", hidden, bias=True)
        yield from _conv1d(f"{prefix}.mlp.c_fc", hidden, inner)
        yield from _conv1d(f"{prefix}.mlp.c_proj", inner, hidden)
    yield from _norm("transformer.ln_f", hidden, bias=True)
    yield from _head("lm_head", c, hidden)


def gpt_neox(c: Values) -> Iterator[ParameterTensor]:
    """GPT-NeoX and Pythia: q, k and v in one matrix, MLP biases in any case."""
    hidden, inner, bias = c["hidden_size"], c["intermediate_size"], c["attention_bias"]
    yield _embedding("gpt_neox.embed_in", c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{layer}"
        for name in PRE_NORMS:
            yield from _norm(f"{prefix}.{name}", hidden, bias=True)
        yield from _linear(f"{prefix}.attention.query_key_value", 3 * hidden, hidden, bias)
        yield from _linear(f"{prefix}.attention.dense", hidden, hidden, bias)
        yield from _linear(f"{prefix}.mlp.dense_h_to_4h", inner, hidden, bias=True)
        yield from _linear(f"{prefix}.mlp.dense_4h_to_h", hidden, inner, bias=True)
    yield from _norm("gpt_neox.final_layer_norm", hidden, bias=True)
    yield from _head("lm_head", c, hidden)


_OPT_POSITION_OFFSET = 2
"""Rows of OPT's position table before position 0 (`OPTLearnedPositionalEmbedding`)."""


def opt(c: Values) -> Iterator[ParameterTensor]:
    """OPT: learned positions, word embeddings of their own width."""
    hidden, inner, bias = c["hidden_size"], c["ffn_dim"], c["enable_bias"]
    word = c["word_embed_proj_dim"] or hidden
    affine = c["layer_norm_elementwise_affine"]
    yield _embedding("model.decoder.embed_tokens", c["vocab_size"], word)
    positions = c["max_position_embeddings"] + _OPT_POSITION_OFFSET
    yield _embedding("model.decoder.embed_positions", positions, hidden)
    if word != hidden:
        yield from _linear("model.decoder.project_out", word, hidden)
        yield from _linear("model.decoder.project_in", hidden, word)
    if c["do_layer_norm_before"] and not c["_remove_final_layer_norm"] and affine:
        yield from _norm("model.decoder.final_layer_norm", hidden, bias=True)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.decoder.layers.{layer}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{prefix}.self_attn.{name}", hidden, hidden, bias)
        if affine:
            yield from _norm(f"{prefix}.self_attn_layer_norm", hidden, bias=True)
        yield from _linear(f"{prefix}.fc1", inner, hidden, bias)
        yield from _linear(f"{prefix}.fc2", hidden, inner, bias)
        if affine:
            yield from _norm(f"{prefix}.final_layer_norm", hidden, bias=True)
    yield from _head("lm_head", c, word)


def mpt(c: Values) -> Iterator[ParameterTensor]:
    """MPT: ALiBi, no biases at all, an MLP of four times the width whatever `expansion_ratio` says."""
    hidden = c["hidden_size"]
    yield _embedding("transformer.wte", c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"transformer.blocks.{layer}"
        yield from _norm(f"{prefix}.norm_1", hidden)
        yield from _linear(f"{prefix}.attn.Wqkv", 3 * hidden, hidden)
        yield from _linear(f"{prefix}.attn.out_proj", hidden, hidden)
        yield from _norm(f"{prefix}.norm_2", hidden)
        yield from _linear(f"{prefix}.ffn.up_proj", 4 * hidden, hidden)
        yield from _linear(f"{prefix}.ffn.down_proj", hidden, 4 * hidden)
    yield from _norm("transformer.norm_f", hidden)
    yield from _head("lm_head", c, hidden)
