"""Attention masks made outside of a transformers model: where a rank holds only some of its layers or positions."""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_masks_for_generate


class Masks:
    """The masks of the positions seen last, made once for all layers that ask.

    Positions that restart mark packed documents, which do not attend to each other, as inside of a model.

    Args:
        config: of the model; its layer types and sliding window count.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._layer_types: list[str] | None = getattr(config, "layer_types", None)
        self._positions: Tensor | None = None
        self._masks: Any = None

    def layer(self, index: int, positions: Tensor, dtype: torch.dtype) -> Any:
        """The mask that the model's layer of this index would get; `None` for a plain causal one under `sdpa`.

        Args:
            index: of the layer in the whole model.
            positions: int64 [samples, positions].
            dtype: of the hidden states.
        """
        if self._positions is not positions:
            self._masks = create_masks_for_generate(
                config=self._config,
                inputs_embeds=torch.empty(*positions.shape, 0, dtype=dtype, device=positions.device),
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            )
            self._positions = positions
        if isinstance(self._masks, dict) and self._layer_types is not None:
            return self._masks[self._layer_types[index]]
        return self._masks
