"""Bytes that a micro batch leaves behind for the backward pass, layer by layer, from the transformers config alone.

What PyTorch saves is decided by the operations that transformers 5.23 calls, so each formula here follows one of its
modules, in bytes a token: `w` is the size of the recipe's number format, `h` the hidden size, `f` the width of the MLP,
`q` and `k` the widths of all query and all key heads of a rank, `n` its number of heads. Korthikanti et al. (arXiv
2205.05198, section 4) count the same way for Megatron's layer: their `34 h` has dropout masks and none of the fp32
copies that transformers' norms make.

Under tensor parallelism what lies between a column- and a row-parallel matrix is divided by the ranks, the residual
stream and the norms are not (section 4.2.1 there, without sequence parallelism). Under Ulysses (arXiv 2309.14509)
each rank has its part of the tokens, and inside attention all tokens of its part of the heads: the same number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from launcher.planning.families import FAMILIES, resolve
from launcher.planning.layer_adapter import ATTENTION_INPUTS, LayerAdapter, MatrixWidths
from launcher.planning.layers import LAYERS, Layer

Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_FP32 = 4
_INT64 = 8
_BATCH_TENSORS = 3  # input_ids, labels, position_ids


@dataclass(frozen=True)
class ActivationSettings:
    """What a rank's activations depend on besides the model.

    Attributes:
        mlp_tiles: parts of the sequence over which each MLP is run and, in the backward pass, run again.
        loss_tiles: the same of head and loss.
        balances_experts: the probabilities of the routers are kept for the load-balancing loss; `None`: as the config's
            `output_router_logits` says.
        packed: several documents in a row, each attending to itself only: a mask of sequence x sequence is made, and
            grouped keys are copied for every query head.
        vocabulary_parallel: the head and the loss are divided by the tensor-parallel ranks.
        adapter: what alone is trained; `None`: all of the model. For the families of `ADAPTED_FAMILIES`.
        distilled: a teacher's probabilities are learnt from besides.
        device: dropout masks take a byte an element on `cuda`, and the size of the number format on `cpu`.
    """

    precision: Literal["fp32", "bf16", "fp16"]
    micro_batch_size: int
    sequence_length: int
    attention: Attention = "sdpa"
    packed: bool = False
    gradient_checkpointing: bool = False
    mlp_tiles: int = 1
    loss_tiles: int = 1
    balances_experts: bool | None = None
    tensor_parallel_size: int = 1
    sequence_parallel_size: int = 1
    vocabulary_parallel: bool = True
    adapter: LayerAdapter | None = None
    distilled: bool = False
    device: Literal["cpu", "cuda"] = "cuda"

    @property
    def tokens(self) -> int:
        """Tokens of a micro batch outside of attention."""
        return self.micro_batch_size * self.sequence_length // self.sequence_parallel_size


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one decoder layer for one micro batch.

    Attributes:
        saved: kept from forward to backward: everything, or the layer's input under gradient checkpointing.
        recomputed: what checkpointing makes again, for one layer at a time; 0 without it.
        backward: gradients that the layer's backward holds at the same time, beyond what it frees.
    """

    saved: int
    recomputed: int
    backward: int


@dataclass(frozen=True)
class EdgeActivations:
    """Bytes of what stands around the layers, for one micro batch.

    Attributes:
        first: the batch itself, and what all layers share (rotary tables, masks): held by every stage that has layers.
        last: the final norm, and the log-probabilities in fp32 that the loss keeps.
        loss: what the loss holds at its peak, above `last`: logits and their gradient in fp32.
    """

    first: int
    last: int
    loss: int


class ActivationModel:
    """The activations of one model under one setting.

    Args:
        config: a transformers config of a family in `LAYERS`.
        settings: batch, number format, attention and layout.
    """

    def __init__(self, config: Mapping[str, Any], settings: ActivationSettings) -> None:
        family = config["model_type"]
        values = resolve(FAMILIES[family], config)
        ranks = settings.tensor_parallel_size
        self.config = config
        self.settings = settings
        self._known_layers: dict[bool, LayerActivations] = {}
        self.layer = LAYERS[family]
        self.values = values
        self.width = BYTES[settings.precision]
        self.hidden: int = values["hidden_size"]
        self.inner: float = FAMILIES[family].inner_size(values) / ranks
        self.heads: float = values["num_attention_heads"] / ranks
        # A rank needs a key head, even where there are fewer of them than ranks.
        self.key_heads: float = max(values["num_key_value_heads"] / ranks, 1)
        self.head_dim: int = values["head_dim"]
        self.vocabulary: float = values["vocab_size"] / (ranks if settings.vocabulary_parallel else 1)
        self.dropout = _dropout(self.layer, config)
        self.softcap = bool(config.get("attn_logit_softcapping", 50.0)) if family == "gemma2" else False
        self.logit_softcap = bool(config.get("final_logit_softcapping", 30.0)) if family == "gemma2" else False

    @property
    def masked(self) -> bool:
        """Whether SDPA is given a mask of sequence x sequence, which also makes it copy grouped keys."""
        return self.settings.packed and self.layer.packed_mask and self.settings.attention == "sdpa"

    def decoder_layer(self, sparse: bool = True) -> LayerActivations:
        """Bytes of one layer; `sparse` tells a mixture-of-experts model's expert layers from its dense ones."""
        if sparse not in self._known_layers:
            self._known_layers[sparse] = self._count_layer(sparse)
        return self._known_layers[sparse]

    def _count_layer(self, sparse: bool) -> LayerActivations:
        tokens, hidden, width = self.settings.tokens, self.hidden, self.width
        tiles = self.settings.mlp_tiles
        mlp = self._mlp(sparse)
        full = tokens * (self._norms() + self._attention() + (mlp if tiles == 1 else 0) + self._residual_dropout())
        if self.settings.adapter is not None:
            full += self.settings.adapter.kept(tokens, width, self._mask_bytes(), self._widths())
        again = tokens * mlp / tiles if tiles > 1 else 0
        backward = tokens * width * (self._widest(sparse) / tiles + 3 * hidden)
        routed = self._balance() if sparse else 0
        if not self.settings.gradient_checkpointing:
            return LayerActivations(saved=int(full) + routed, recomputed=int(again), backward=int(backward))
        saved = tokens * width * hidden + routed
        return LayerActivations(saved=saved, recomputed=int(full + again), backward=int(backward))

    def _balance(self) -> int:
        """Of a layer with experts; kept under checkpointing too, because the loss is made outside of the layers."""
        balances = self.settings.balances_experts
        if balances is None:
            balances = bool(self.config.get("output_router_logits"))
        if not balances or self.layer.mlp != "experts":
            return 0
        number: int = self.values["num_experts"]
        return self.settings.tokens * self.width * number

    def edges(self) -> EdgeActivations:
        """Bytes of batch, shared tables, final norm and loss."""
        settings, width = self.settings, self.width
        tables = _FP32 if self.layer.norm == "olmo" else width
        shared = 2 * tables * self._rotary_dim() if self.layer.rotary != "none" else 0
        if settings.gradient_checkpointing and (self.masked or settings.attention == "eager"):
            # Each layer's recomputation holds on to its mask: booleans, or what eager attention adds to the scores.
            shared += self.layer.masks * settings.sequence_length * (width if settings.attention == "eager" else 1)
        if settings.sequence_parallel_size > 1 and self.masked:  # positions of the whole sequence, and their mask
            shared += settings.sequence_parallel_size * (_INT64 + self.layer.masks * settings.sequence_length)
        first = settings.tokens * (_BATCH_TENSORS * _INT64 + shared)
        if self.dropout is not None and self.dropout[1] and self.layer.fused_qkv:  # GPT-2's, of the embeddings
            first += settings.tokens * self._mask_bytes() * self.hidden
        adapter = settings.adapter
        if adapter is not None and not (adapter.embedding or settings.gradient_checkpointing):
            # Embeddings are frozen: the first norm keeps nothing, and dropout of what it makes no mask.
            masks = adapter.attention_masks * self._mask_bytes() * self.hidden
            first -= settings.tokens * (self._norm(self.hidden, 1) + masks)
        log_probabilities = _FP32 * self.vocabulary
        capped = width * self.vocabulary if self.logit_softcap else 0
        kept = log_probabilities + capped if settings.loss_tiles == 1 else 0
        head = width * self.hidden if adapter is None or adapter.head else 0
        # Distillation (`tasks/distillation.py: soft_loss`): both models' probabilities at a temperature.
        softened = 2 * _FP32 * self.vocabulary if settings.distilled else 0
        last = settings.tokens * (self._norm(self.hidden, 1) + head + kept + softened)
        # Backward: the gradient of the log-probabilities and that of the logits, each in fp32, beside what is saved.
        loss = 2 * log_probabilities
        if settings.loss_tiles > 1:
            loss = (3 * log_probabilities + capped) / settings.loss_tiles + width * self.hidden
        return EdgeActivations(first=int(first), last=int(last), loss=int(settings.tokens * loss))

    def _rotary_dim(self) -> float:
        """Width of the sine and cosine tables; a share of the head where the family turns only a part of it."""
        parameters = self.config.get("rope_parameters") or {}
        default = 0.25 if self.config["model_type"] == "gpt_neox" else 1.0
        share = parameters.get("partial_rotary_factor", self.config.get("rotary_pct", default))
        return self.head_dim * float(share)

    def _norm(self, size: float, groups: float) -> float:
        """What a norm over `groups` vectors of together `size` elements saves a token, its output not counted."""
        match self.layer.norm:
            case "rms":  # the input in fp32, the root of its mean square, the normalised input in the number format
                normalised = self.width if self.settings.adapter is None else 0
                return (_FP32 + normalised) * size + _FP32 * groups
            case "olmo" | "gemma":  # the normalised input stays fp32 for the product with the weight
                return 2 * _FP32 * size + _FP32 * groups
            case "layer":  # the input, mean and deviation
                return self.width * size + 2 * self.width * groups

    def _widths(self) -> MatrixWidths:
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        return MatrixWidths(self.hidden, queries, keys, self.inner)

    def _reads(self, *matrices: str) -> bool:
        """Whether one of these matrices needs its input for a gradient of weights."""
        adapter = self.settings.adapter
        return adapter is None or adapter.reads(*matrices)

    def _norms(self) -> float:
        """Norms of the residual stream, and what the matrices after them keep as their input."""
        hidden, width = self.hidden, self.width
        inputs = (self._reads(*ATTENTION_INPUTS) + self._reads("gate_proj", "up_proj")) * width * hidden
        before = 2 * self._norm(hidden, 1) if self.layer.before else 0.0
        if self.layer.parallel:
            before -= width * hidden  # both norms read, and LayerNorm saves, the same tensor
        after = 2 * self._norm(hidden, 1) if self.layer.after else 0.0
        return inputs + before + after

    def _attention(self) -> float:
        width, length = self.width, self.settings.sequence_length
        queries, keys = self.heads * self.head_dim, self.key_heads * self.head_dim
        repeated = self.masked and keys < queries and self.key_heads > 1  # one head alone is expanded without a copy
        norms = 0.0
        if self.layer.qk_norm:
            norms = self._norm(queries + keys, self.heads + self.key_heads)
        if self.settings.attention == "eager":
            return norms + 4 * width * queries + self._eager_scores() * self.heads * length
        if self._has_math_path():
            return norms + (3 * _FP32 + width) * queries + 3 * _FP32 * self.heads * length
        of_values = queries if repeated else keys
        if self.layer.fused_qkv and self.layer.rotary == "none":
            inputs = 3 * queries
        else:
            if self.layer.fused_qkv and not repeated:
                of_values = queries + 2 * keys  # a view keeps the whole product alive
            inputs = queries + (queries if repeated else keys) + of_values
        output = queries * (2 if self.layer.rotary == "partial" else 1)  # joined heads lie in another order
        statistics = _FP32 * self.heads
        # Under Ulysses each rank has the mask of all positions.
        mask = width * length * self.settings.sequence_parallel_size if self.masked else 0
        return norms + width * (inputs + output) + statistics + mask

    def _eager_scores(self) -> float:
        """Bytes kept for each pair of positions and each head."""
        width = self.width
        probabilities = _FP32 + (width if width != _FP32 else 0) if self.layer.eager_fp32 else width
        capped = width if self.softcap else 0
        dropped = 0
        if self.dropout is not None and self.dropout[0]:
            dropped = self._mask_bytes() + width
            probabilities = width if not self.layer.eager_fp32 else probabilities
        return probabilities + capped + dropped

    def _has_math_path(self) -> bool:
        """SDPA with dropout has no fused kernel on CPU and keeps every step in fp32."""
        dropped = self.dropout is not None and self.dropout[0] > 0
        return dropped and self.settings.attention == "sdpa" and self.settings.device == "cpu"

    def _mlp(self, sparse: bool) -> float:
        width, inner = self.width, self.inner
        match self.layer.mlp:
            case "gated":  # gate, its activation, up, and their product
                return (3 + self._reads("down_proj")) * width * inner
            case "gelu":
                return 2 * width * inner
            case "relu":  # keeps its result only, which is the next matrix's input
                return width * inner
            case "gelu_new":  # written out in PyTorch: x, x cubed, tanh, and two products
                return 5 * width * inner
            case "experts":
                return self._experts() if sparse else 4 * width * inner

    def _experts(self) -> float:
        """Router and grouped matrix products (`grouped_mm`): each token is copied for each expert that it passes."""
        values, width, hidden = self.values, self.width, self.hidden
        ranks = self.settings.tensor_parallel_size
        chosen: int = values["num_experts_per_tok"]
        number: int = values["num_experts"]
        inner: float = (values.get("moe_intermediate_size") or values["intermediate_size"]) / ranks
        router = _FP32 * number + _INT64 * chosen
        indices = (3 * _INT64 + 2 * width) * chosen
        copies = 2 * width * hidden * chosen  # gathered inputs, and outputs before they are weighted
        matrices = 4 * width * inner * chosen
        shared = 0.0
        if "shared_expert_intermediate_size" in values:
            shared = 4 * width * values["shared_expert_intermediate_size"] / ranks + width * (hidden + 1)
        return router + indices + copies + matrices + shared

    def _widest(self, sparse: bool) -> float:
        """Elements a token of the widest gradient inside the layer."""
        if self.layer.mlp != "experts" or not sparse:
            return self.inner
        values = self.values
        inner: int = values.get("moe_intermediate_size") or values["intermediate_size"]
        chosen: int = values["num_experts_per_tok"]
        return chosen * (2 * inner / self.settings.tensor_parallel_size + self.hidden)

    def _residual_dropout(self) -> float:
        if self.dropout is None or not self.dropout[1]:
            return 0.0
        return 2 * self._mask_bytes() * self.hidden

    def _mask_bytes(self) -> int:
        return 1 if self.settings.device == "cuda" else self.width


def _dropout(layer: Layer, config: Mapping[str, Any]) -> tuple[float, float] | None:
    if layer.dropout is None:
        return None
    (attention, attention_default), (residual, residual_default) = layer.dropout
    return float(config.get(attention, attention_default)), float(config.get(residual, residual_default))
