"""Pipeline parallelism: a transformers causal language model as the list of layers that DeepSpeed's pipeline runs.

Each rank builds the layers of its own stage only. What passes from layer to layer is (hidden states, positions).
"""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launcher.models.masks import Masks
from launcher.models.parallel import vocabulary_embedding, vocabulary_linear, with_divided_matrices
from launcher.models.pieces import Pieces
from launcher.planning.plan import Plan

Hidden = tuple[Tensor, Tensor]
"""Hidden states [samples, positions, width] and int64 positions [samples, positions]."""

_TIED = "embedding"


class Stage:
    """What all layers of a rank's stage share.

    Attributes:
        pieces: makes the layers.
        group: of the tensor-parallel ranks, once there is one; `None` without tensor parallelism.
        checkpointing: recompute each layer's activations in the backward pass.
    """

    def __init__(self, pieces: Pieces, *, checkpointing: bool) -> None:
        self.pieces = pieces
        self.group: Any = None
        self.checkpointing = checkpointing
        self._masks = Masks(pieces.config)
        self._rotary: Any = None
        self._positions: Tensor | None = None
        self._embeddings: dict[str | None, Any] = {}

    def mask(self, index: int, positions: Tensor, dtype: torch.dtype) -> Any:
        """The attention mask of a layer."""
        return self._masks.layer(index, positions, dtype)

    def position_embeddings(self, index: int, hidden: Tensor, positions: Tensor) -> Any:
        """The rotary embeddings of a layer's kind, made once for all layers that see the same positions."""
        if self._rotary is None:
            # Never a part of a module that DeepSpeed casts: the frequencies must stay fp32.
            self._rotary = self.pieces.make("model.rotary_emb").to(hidden.device)
        if self._positions is not positions:
            self._positions, self._embeddings = positions, {}
        kind = self._kind(index)
        if kind not in self._embeddings:
            arguments = (hidden, positions) if kind is None else (hidden, positions, kind)
            self._embeddings[kind] = self._rotary(*arguments)
        return self._embeddings[kind]

    def _kind(self, index: int) -> str | None:
        """The layer's kind, where the family has rotary embeddings for each (Gemma 3)."""
        if not hasattr(self._rotary, "layer_types"):
            return None
        kind: str = self.pieces.config.layer_types[index]
        return kind


class Embedding(nn.Module):
    """Tokens to hidden states; where it is tied, the output head as well."""

    def __init__(self, stage: Stage, *, divided: bool) -> None:
        super().__init__()
        embedding = stage.pieces.make("model.embed_tokens")
        self.embedding = vocabulary_embedding(embedding, stage.group) if divided and stage.group else embedding

    def forward(self, inputs: Hidden) -> Hidden:
        """Look up token ids [samples, positions]."""
        input_ids, positions = inputs
        return self.embedding(input_ids), positions


class Block(nn.Module):
    """One decoder layer of transformers."""

    def __init__(self, stage: Stage, index: int) -> None:
        super().__init__()
        self.layer = stage.pieces.make(f"model.layers.{index}")
        if stage.group is not None:
            with_divided_matrices(self.layer, stage.group)
        self._stage = stage
        self._index = index

    def forward(self, inputs: Hidden) -> Hidden:
        """Run the layer; positions pass through."""
        hidden, positions = inputs
        if self._stage.checkpointing and self.training:
            return checkpoint(self._run, hidden, positions, use_reentrant=False), positions
        return self._run(hidden, positions), positions

    def _run(self, hidden: Tensor, positions: Tensor) -> Tensor:
        stage = self._stage
        output: Tensor = self.layer(
            hidden,
            attention_mask=stage.mask(self._index, positions, hidden.dtype),
            position_embeddings=stage.position_embeddings(self._index, hidden, positions),
            position_ids=positions,
            past_key_values=None,
            use_cache=False,
        )
        return output


class Norm(nn.Module):
    """The last normalisation; positions end here."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.norm = stage.pieces.make("model.norm")

    def forward(self, inputs: Hidden) -> Tensor:
        """Normalise hidden states."""
        normalised: Tensor = self.norm(inputs[0])
        return normalised


class Head(nn.Module):
    """The output head of a model whose embedding is not tied."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        head = stage.pieces.make("lm_head")
        self.head = vocabulary_linear(head, stage.group) if stage.group else head
        self._config = stage.pieces.config

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the whole vocabulary, or of this tensor-parallel rank's part of it."""
        return _finished(self._config, self.head(hidden))


def _tied_head(config: Any) -> Callable[[Embedding, Tensor], Tensor]:
    def logits(module: Embedding, hidden: Tensor) -> Tensor:
        group = getattr(module.embedding, "mp_group", None)
        if group is not None:
            from deepspeed.module_inject.layers import ColumnParallel

            hidden = ColumnParallel.apply(group, hidden)
        weight: Any = module.embedding.weight
        return _finished(config, F.linear(hidden, weight))

    return logits


def _finished(config: Any, logits: Tensor) -> Tensor:
    """What some families (Gemma 2) do with the logits at last."""
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


class Pipeline(PipelineModule):  # type: ignore[misc]  # DeepSpeed has no types
    """DeepSpeed's pipeline of a plan's model, cut where the plan cuts it.

    Attributes:
        stage: what this rank's layers share.

    Args:
        plan: with a pipeline.
        auto_class: the transformers auto class of the task.
    """

    def __init__(self, plan: Plan, auto_class: Any) -> None:
        layout, borders = plan.layout, plan.stage_borders
        if borders is None:
            raise ValueError("the plan has no pipeline")
        pieces = Pieces(plan, auto_class)
        stage = Stage(pieces, checkpointing=plan.recipe.training.gradient_checkpointing)
        tied = bool(pieces.config.tie_word_embeddings)
        weight = "embedding.weight"
        if tied:
            first = TiedLayerSpec(_TIED, Embedding, stage, divided=True, tied_weight_attr=weight)
            last = TiedLayerSpec(
                _TIED, Embedding, stage, divided=True, forward_fn=_tied_head(pieces.config), tied_weight_attr=weight
            )
        else:
            first, last = LayerSpec(Embedding, stage, divided=False), LayerSpec(Head, stage)
        blocks = [LayerSpec(Block, stage, index) for index in range(borders[-1])]
        # One layer before the blocks, two behind them.
        self._borders = [0, *(1 + border for border in borders[1:-1]), borders[-1] + 3]
        self._shared = stage
        self._divided = layout.tensor_parallel_size > 1
        with redirect_stdout(io.StringIO()):  # it prints its seeds and its topology
            super().__init__(
                layers=[first, *blocks, LayerSpec(Norm, stage), last],
                topology=PipeModelDataParallelTopology(
                    num_pp=layout.pipeline_parallel_size,
                    num_dp=layout.data_parallel_size,
                    num_mp=layout.tensor_parallel_size,
                ),
            )

    def _partition_layers(self, method: str = "uniform") -> None:
        """Cut where the plan cuts. DeepSpeed would build every layer on every rank to count its parameters."""
        if self._divided:
            from deepspeed.module_inject.layers import set_autotp_mode

            set_autotp_mode(training=True)
            self._shared.group = self._grid.get_slice_parallel_group()
        self.parts = self._borders
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])

    def get_output_embeddings(self) -> Any | None:
        """The output head of the last stage, as of a transformers model; `None` on the others."""
        if self.stage_id != self.num_stages - 1:
            return None
        if _TIED in self.tied_modules:
            return self.tied_modules[_TIED].embedding
        return self.forward_funcs[-1].head
