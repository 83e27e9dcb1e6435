"""MLPs and loss computed in parts of the sequence (ALST, arXiv 2506.13996, sections 3.1 and 3.2), for long sequences.

Only one part's activations are there at a time: forward keeps the inputs, backward computes each part again.
"""

from typing import Any

import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from torch import Tensor, nn


def tile_mlps(model: nn.Module, tiles: int) -> None:
    """Have every decoder layer's MLP run over so many parts of the sequence, one after the other."""
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP

    def tiled(mlp: nn.Module) -> Any:
        whole = mlp.forward

        def forward(hidden: Tensor) -> Any:
            return TiledMLP.apply(lambda _, part: whole(part), mlp, hidden, tiles, [*mlp.parameters()])

        return forward

    for layer in _layers(model):
        layer.mlp.forward = tiled(layer.mlp)


def tile_loss(model: nn.Module) -> None:
    """Let the output head hand hidden states on instead of logits while `hands_on` is set, for `tiled_loss_sum`."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # of PreTrainedModel
    whole = head.forward
    head.hands_on = False
    head.forward = lambda hidden: hidden if head.hands_on else whole(hidden)


def tiled_loss_sum(model: Any, inputs: dict[str, Any], labels: Tensor, tiles: int, ignored: int) -> Tensor:
    """Run a model and sum its cross-entropy over parts of the sequence.

    Args:
        model: that `tile_loss` prepared, or the engine around it.
        inputs: of its forward pass.
        labels: [samples, positions], shifted already.
        tiles: number of parts.
        ignored: label of a position that is no target.

    Returns:
        The sum, in nats.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import sequence_tiled_compute

    head = getattr(model, "module", model).get_output_embeddings()
    head.hands_on = True
    try:
        hidden = model(**inputs).logits
    finally:
        head.hands_on = False

    def of_part(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = head(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction="sum")

    loss_sum: Tensor = sequence_tiled_compute(
        fn=of_part,
        seqlen=labels.shape[1],
        shards=tiles,
        kwargs_to_shard={"hidden": hidden, "labels": labels},
        kwargs_to_pass={},
        grad_requiring_tensor_key="hidden",
        compute_params=[*head.parameters()],
        output_unshard_dimension=0,
        output_reduction="sum",
    )
    return loss_sum


def _layers(model: Any) -> Any:
    return model.get_decoder().layers
