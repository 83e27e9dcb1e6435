"""How the decoder layers of each family are put together, as far as it matters to what they save for backward."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Layer:
    """How a family's decoder layer is put together.

    Attributes:
        norm: `rms` as in Llama, `olmo` and `gemma` with the weight applied in fp32, `layer` is LayerNorm.
        before: norms before attention and MLP; without them both read the residual stream.
        after: norms of what attention and MLP return.
        parallel: attention and MLP read the same residual (GPT-NeoX).
        qk_norm: normalises queries and keys.
        rotary: `partial` turns a part of each head and joins it with the rest, in a new layout.
        fused_qkv: queries, keys and values are views of one matrix product.
        mlp: the operations between the first and the last matrix of the MLP.
        eager_fp32: eager softmax is computed in fp32 and cast back.
        sdpa: transformers runs the family with SDPA.
        packed_mask: transformers sees from the positions that rows are packed.
        masks: 2 where layers with a sliding window stand among others.
        dropout: defaults of (attention, residual) dropout, by field name.
    """

    norm: Literal["rms", "olmo", "gemma", "layer"] = "rms"
    before: bool = True
    after: bool = False
    parallel: bool = False
    qk_norm: bool = False
    rotary: Literal["full", "partial", "none"] = "full"
    fused_qkv: bool = False
    mlp: Literal["gated", "gelu", "gelu_new", "relu", "experts"] = "gated"
    eager_fp32: bool = True
    sdpa: bool = True
    packed_mask: bool = True
    masks: int = 1
    dropout: tuple[tuple[str, float], tuple[str, float]] | None = None


LAYERS: dict[str, Layer] = {
    "llama": Layer(),
    "mistral": Layer(),
    "qwen2": Layer(),
    "qwen3": Layer(qk_norm=True),
    "gemma": Layer(norm="gemma"),
    "gemma2": Layer(norm="gemma", after=True, sdpa=False, masks=2),
    "gemma3_text": Layer(norm="gemma", after=True, qk_norm=True, masks=2),
    "phi3": Layer(rotary="partial", fused_qkv=True),
    "olmo2": Layer(norm="olmo", before=False, after=True, qk_norm=True),
    "olmo3": Layer(norm="olmo", before=False, after=True, qk_norm=True),
    "smollm3": Layer(),
    "granite": Layer(),
    "starcoder2": Layer(norm="layer", mlp="gelu"),
    "mixtral": Layer(mlp="experts"),
    "qwen2_moe": Layer(mlp="experts"),
    "qwen3_moe": Layer(mlp="experts", qk_norm=True),
    "gpt2": Layer(
        norm="layer", rotary="none", fused_qkv=True, mlp="gelu_new", eager_fp32=False,
        dropout=(("attn_pdrop", 0.1), ("resid_pdrop", 0.1)),
    ),
    "gpt_neox": Layer(norm="layer", parallel=True, rotary="partial", fused_qkv=True, mlp="gelu"),
    "opt": Layer(
        norm="layer", rotary="none", mlp="relu", packed_mask=False,
        dropout=(("attention_dropout", 0.0), ("dropout", 0.1)),
    ),
    "mpt": Layer(norm="layer", rotary="none", fused_qkv=True, mlp="gelu", sdpa=False),
}  # fmt: skip
"""By `model_type`; each row is compared with the real model's saved tensors by the tests."""
