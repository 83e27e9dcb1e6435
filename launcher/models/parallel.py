"""What a model needs so that tensor-parallel ranks share it: divided matrices, losses on parts of the vocabulary."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from torch import Tensor, nn

COLUMN = frozenset({"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"})
"""Matrices whose outputs are divided among tensor-parallel ranks (Shoeybi et al., arXiv 1909.08053)."""
ROW = frozenset({"o_proj", "down_proj"})
"""Matrices whose inputs are divided; the results are summed, and a bias is added once."""


def with_divided_matrices(layer: nn.Module, group: Any) -> None:
    """Put DeepSpeed's tensor-parallel layers in the place of a decoder layer's matrices; each keeps a rank's part."""
    from deepspeed.module_inject.layers import LinearAllreduce, LinearLayer

    for parent in [*layer.modules()]:
        for name, child in [*parent.named_children()]:
            if name in COLUMN:
                setattr(parent, name, LinearLayer(child, group, name=name))
            elif name in ROW:
                setattr(parent, name, LinearAllreduce(child, group, name=name))


def vocabulary_linear(head: nn.Module, group: Any) -> Any:
    """An output head of which each tensor-parallel rank keeps a part of the vocabulary."""
    from deepspeed.module_inject.layers import VocabParallelLinear

    return VocabParallelLinear(head, group, name="lm_head")


def vocabulary_embedding(embedding: nn.Module, group: Any) -> Any:
    """The same for an embedding that is tied to the head."""
    from deepspeed.module_inject.layers import VocabParallelEmbedding

    divided = VocabParallelEmbedding(embedding, group, name="embed_tokens")
    divided.is_vocab_parallel_lm_head, divided.gather_output = True, False
    return divided


def vocabulary_head(model: Any) -> Any | None:
    """The output head, when tensor-parallel ranks hold a part of the vocabulary each; `None` when each holds it all."""
    module = getattr(model, "module", model)
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    return head if getattr(head, "is_vocab_parallel_lm_head", False) else None


def cross_entropy_sum(model: Any, logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """Cross-entropy in nats, summed over targets, in fp32 whatever the model's precision.

    Args:
        model: that made the logits, or the engine around it.
        logits: [samples, positions, vocabulary], or this rank's part of the vocabulary.
        labels: [samples, positions], shifted already.
        ignored: label of a position that is no target.
    """
    return sharded_cross_entropy_sum(vocabulary_head(model), logits, labels, ignored)


@contextmanager
def whole_logits(model: Any) -> Iterator[None]:
    """Let every tensor-parallel rank have the logits of the whole vocabulary, for generating."""
    head = vocabulary_head(model)
    if head is not None:
        head.gather_output = True
    try:
        yield
    finally:
        if head is not None:
            head.gather_output = False


def sharded_cross_entropy_sum(head: Any | None, logits: Tensor, labels: Tensor, ignored: int = -100) -> Tensor:
    """The same, for the logits of a given head (`vocabulary_head`)."""
    if head is None or head.gather_output:
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction="sum")
    from deepspeed.sequence.cross_entropy import vocab_parallel_cross_entropy

    loss_sum: Tensor = vocab_parallel_cross_entropy(
        logits,
        labels,
        tp_group=head.mp_group,
        vocab_start_index=head.vocab_start_index,
        vocab_end_index=head.vocab_end_index,
        global_vocab_size=head.vocab_size,
        ignore_index=ignored,
        reduction="sum",
    )
    return loss_sum
