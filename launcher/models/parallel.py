"""What a model needs around it so that it can be spread over ranks: losses on shards of the vocabulary."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from torch import Tensor


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
