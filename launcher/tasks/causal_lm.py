"""Causal language modelling: predict each token from the ones before it in its document."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from launcher.data.derived import Annotations, Derivation
from launcher.data.examples import ExampleEncoder
from launcher.data.store import PreparedData
from launcher.models.experts import balance_weight
from launcher.models.parallel import cross_entropy_sum
from launcher.models.tiling import tiled_loss_sum
from launcher.planning.alone import plan_alone
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe, reads_packed_text
from launcher.tasks.asking import samples_at_once
from launcher.tasks.base import Batch, LossOutput, Sample, Task
from launcher.tasks.conversations import ConversationEncoder
from launcher.tasks.distillation import Distillation, with_projections
from launcher.tasks.padding import pad
from launcher.tasks.soft_targets import FILLED, TokenTargets, collate_known

IGNORED = -100
"""Label of a position that is no target, as in transformers."""


class CausalLanguageModelling(Task):
    """Next-token prediction, over packed rows of text or over conversations, one a sample or packed too.

    A row holds several documents. Position ids that restart at each document make transformers build a block-diagonal
    causal mask (`masking_utils.find_packed_sequence_indices`), so no attention mask travels with the batch. A
    conversation is padded at its end, which nothing before it sees.
    """

    auto_class = AutoModelForCausalLM
    adapter_task = "CAUSAL_LM"

    def __init__(self, plan: Plan, facts: Mapping[str, Any]) -> None:
        super().__init__(plan, facts)
        section = plan.recipe.distillation
        self.distillation = None if section is None else Distillation(plan, section, self.auto_class)

    @classmethod
    def encoder(cls, recipe: Recipe) -> ExampleEncoder | None:
        """Make the encoder of conversations; packed text needs none."""
        return None if reads_packed_text(recipe) else ConversationEncoder(recipe)

    def build_model(self) -> torch.nn.Module:
        """Build the model in the recipe's precision; with a pipeline, this rank's stage of it."""
        if self.plan.layout.pipeline_parallel_size > 1:
            from launcher.models.pipeline import Pipeline

            return Pipeline(self.plan, AutoModelForCausalLM)
        model: torch.nn.Module = with_projections(super().build_model(), self.plan)
        return model

    @classmethod
    def derivations(cls, recipe: Recipe, prepared: PreparedData) -> list[Derivation]:
        """What the teacher says of each position, where it is to be asked once."""
        found = super().derivations(recipe, prepared)
        section = recipe.distillation
        if section is not None and section.precompute:
            task = cls(plan_alone(recipe, samples_at_once(recipe)), prepared.facts)
            tokens = task.config().get_text_config().vocab_size
            arguments = (recipe, section, prepared, cls.auto_class, task.collate)
            found.append(Annotations(TokenTargets(*arguments, tokens=tokens)))
        return found

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Stack samples to `input_ids`, `labels`, `position_ids`, int64 of shape [samples, length] each.

        Labels come shifted: `labels[:, t]` is the token after `input_ids[:, t]`, so that the loss needs no copy of
        the logits.
        """
        if reads_packed_text(self.plan.recipe):
            names = ("input_ids", "labels", "position_ids")
            batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in names}
        else:
            batch = {
                "input_ids": pad(samples, "input_ids", self.facts["pad_token_id"])["input_ids"],
                "labels": pad(samples, "labels", IGNORED)["labels"],
            }
            batch["position_ids"] = _positions(samples, batch["labels"].shape[1])
        batch["labels"] = torch.cat(
            [batch["labels"][:, 1:], batch["labels"].new_full((len(samples), 1), IGNORED)], dim=1
        )
        return {**batch, **collate_known(samples, batch["labels"].shape[1])}

    def num_targets(self, batch: Batch) -> int:
        """Count the positions that have a next token to predict."""
        return int((batch["labels"] != IGNORED).sum())

    @cached_property
    def balance(self) -> float:
        """Weight of the load-balancing loss of a mixture of experts; 0 without one."""
        return balance_weight(self.config(), self.plan.recipe.training.router_aux_loss_coef)

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Cross-entropy in nats, summed over targets, in fp32 whatever the model's precision.

        In training, a mixture of experts' load-balancing loss is added: that of the micro batch, which counts by its
        targets as the cross-entropy does.
        """
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        balances = self.balance > 0 and model.training
        labels, tiles = batch["labels"], self.plan.recipe.training.loss_tiles
        if tiles > 1:
            return LossOutput(tiled_loss_sum(model, inputs, labels, tiles, IGNORED), (labels != IGNORED).sum())
        teaching = self.distillation if self.distillation is not None and model.training else None
        more = {"output_router_logits": True} if balances else {}
        output = model(**inputs, **more, **({} if teaching is None else teaching.wanted))
        counted = labels != IGNORED
        num_targets = counted.sum()
        logits = output.logits[:, -labels.shape[1] :]  # a learnt prompt has positions of its own before the text's
        loss_sum = cross_entropy_sum(model, logits, labels, IGNORED)
        if teaching is not None:
            known = {name: batch[name] for name in FILLED if name in batch}
            output.logits = logits
            loss_sum = teaching.loss(loss_sum, output, inputs, counted, counted.float(), known)
        if balances:
            loss_sum = loss_sum + self.balance * num_targets * output.aux_loss
        return LossOutput(loss_sum, num_targets)


def _positions(samples: Sequence[Sample], length: int) -> torch.Tensor:
    """Positions of each conversation, int64 [samples, length]; they restart at each one and at what fills up a row."""
    rows = []
    for sample in samples:
        own = sample.get("position_ids", np.arange(length))
        rows.append(np.concatenate([own, np.arange(length - len(own))]).astype(np.int64))
    return torch.from_numpy(np.stack(rows))
