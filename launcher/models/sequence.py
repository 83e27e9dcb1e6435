"""Sequence parallelism (Ulysses, arXiv 2309.14509; ALST, arXiv 2506.13996): each rank holds a part of every sequence.

Attention alone needs all positions: DeepSpeed's all-to-all gives each rank all positions of a part of the heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from launcher.models.masks import Masks
from launcher.planning.layout import BatchPlan, Layout


class SequenceParallelAttention:
    """Takes the place of a model's attention function.

    DeepSpeed's own wrapper (`runtime/sequence_parallel/ulysses_sp.py: register_with_transformers`) drops every mask, so
    that under `sdpa` packed documents attend to each other and sliding windows are ignored; this one makes the masks of
    the whole sequence.
    """

    def __init__(self, model: Any, layout: Layout, batch: BatchPlan, mpu: Any) -> None:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        config = model.config
        self.enabled = True
        self._group = mpu.get_sequence_parallel_group()
        self._size = layout.sequence_parallel_size
        self._core = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
        self._masks = Masks(config)
        self._seen: tuple[Tensor, Tensor] | None = None
        self._exchange = UlyssesSPAttentionHF(
            attn=self._core,
            batch_size=batch.micro_batch_size,
            attn_head_count=config.num_attention_heads,
            attn_head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            kv_head_count=config.num_key_value_heads,
            num_hidden_layers=config.num_hidden_layers,
            process_group=self._group,
            seq_length_is_variable=True,
        )

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        """As transformers calls an attention function; `attention_mask` is of this rank's positions and not used."""
        if not self.enabled:
            return self._core(module, query, key, value, attention_mask, **kwargs)
        positions = self._whole(kwargs["position_ids"])
        mask = self._masks.layer(module.layer_idx, positions, query.dtype)
        # With fewer key-value heads than ranks, the exchange copies them and changes this number.
        groups = module.num_key_value_groups
        try:
            return self._exchange(module, query, key, value, mask, **kwargs)
        finally:
            module.num_key_value_groups = groups

    def _whole(self, positions: Tensor) -> Tensor:
        """Positions of the whole sequences; all layers of a forward pass bring the same tensor."""
        if self._seen is None or self._seen[0] is not positions:
            parts = [torch.empty_like(positions) for _ in range(self._size)]
            dist.all_gather(parts, positions.contiguous(), group=self._group)
            self._seen = positions, torch.cat(parts, dim=1)
        return self._seen[1]


def spread_sequences(model: Any, layout: Layout, batch: BatchPlan) -> Any:
    """Make the groups, put the exchange around the model's attention, and return DeepSpeed's model-parallel unit.

    The function is replaced under its name for the whole process, because transformers looks at the name elsewhere too.
    """
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as mpu

    mpu.initialize_sequence_parallel(layout.sequence_parallel_size)
    attention = SequenceParallelAttention(model, layout, batch, mpu)
    ALL_ATTENTION_FUNCTIONS[model.config._attn_implementation] = attention
    model.sequence_parallel_attention = attention
    return mpu


@contextmanager
def whole_sequences(model: Any) -> Iterator[None]:
    """Let a rank run whole sequences by itself, for generating."""
    attention = getattr(getattr(model, "module", model), "sequence_parallel_attention", None)
    if attention is not None:
        attention.enabled = False
    try:
        yield
    finally:
        if attention is not None:
            attention.enabled = True
