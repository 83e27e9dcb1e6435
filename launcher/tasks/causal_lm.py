"""Causal language modelling: predict each token from the ones before it in its document."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from launcher.models.parallel import cross_entropy_sum
from launcher.tasks.base import Batch, LossOutput, Sample, Task

IGNORED = -100
"""Label of a position that is no target, as in transformers."""


class CausalLanguageModelling(Task):
    """Next-token prediction over packed rows.

    A row holds several documents. Position ids that restart at each document make transformers build a block-diagonal
    causal mask (`masking_utils.find_packed_sequence_indices`), so no attention mask travels with the batch.
    """

    auto_class = AutoModelForCausalLM

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack rows to `input_ids`, `labels`, `position_ids`, int64 of shape [samples, sequence_length] each.

        Labels come shifted: `labels[:, t]` is the token after `input_ids[:, t]`, so that the loss needs no copy of
        the logits.
        """
        batch = {
            name: torch.from_numpy(np.stack([sample[name] for sample in samples]))
            for name in ("input_ids", "labels", "position_ids")
        }
        batch["labels"] = torch.cat(
            [batch["labels"][:, 1:], batch["labels"].new_full((len(samples), 1), IGNORED)], dim=1
        )
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Count the positions that have a next token to predict."""
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Cross-entropy in nats, summed over targets, in fp32 whatever the model's precision."""
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        labels = batch["labels"]
        loss_sum = cross_entropy_sum(model, logits, labels, IGNORED)
        return LossOutput(loss_sum, (labels != IGNORED).sum())
