"""Learning from pairs of answers: preference optimisation without a reward model, and reward models."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from launcher.data.derived import Annotations, Derivation
from launcher.data.examples import BadExample, Example, Field, Row
from launcher.data.store import PreparedData
from launcher.models.build import build_model
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.recipe.task_sections import PreferenceSection
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.conversations import ConversationEncoder
from launcher.tasks.padding import pad, padding_token
from launcher.tasks.reference import ReferenceScores
from launcher.tasks.sequence_classification import with_labels

IGNORED = -100
"""Label of a position that is no target, as in transformers."""


class PairEncoder:
    """Rows with `prompt`, `chosen` and `rejected`, all text."""

    roles: tuple[str, ...] = ("prompt", "chosen", "rejected")
    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.one = ConversationEncoder(recipe)
        self.pads = recipe.task == "reward_model"
        self.tokenizer: Any = None

    def identity(self) -> Any:
        """Nothing but what counts anyway."""
        return []

    def texts(self, row: Row) -> list[str]:
        """All three."""
        return [str(row[role] or "") for role in self.roles]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Check the tokenizer."""
        self.tokenizer = tokenizer
        self.one.begin(tokenizer, training_rows)
        if self.pads:
            padding_token(tokenizer)

    def fields(self) -> dict[str, Field]:
        """Tokens of both answers with the prompt before them; the answers' as labels."""
        return {
            f"{side}_{name}": Field(kind)
            for side in ("chosen", "rejected")
            for name, kind in (("input_ids", "uint32"), ("labels", "int32"))
        }

    def encode(self, rows: Sequence[Row]) -> list[Example | BadExample]:
        """Tokenise, the prompt by itself, as it will be when the model is used."""
        return [self._pair(row) for row in rows]

    def _pair(self, row: Row) -> Example | BadExample:
        if str(row["chosen"] or "").strip() == str(row["rejected"] or "").strip():
            return BadExample("its two answers are the same")
        example: Example = {}
        for side in ("chosen", "rejected"):
            one = self.one.completion({"prompt": row["prompt"], "completion": row[side]})
            if isinstance(one, BadExample):
                return one
            example |= {f"{side}_{name}": values for name, values in one.items()}
        return example

    def facts(self) -> dict[str, Any]:
        """What fills up a batch."""
        return {"pad_token_id": padding_token(self.tokenizer)} if self.pads else self.one.facts()


def collate_pairs(samples: Sequence[Sample], filler: int) -> Batch:
    """Pad to `input_ids`, `labels` and `attention_mask`, int64 [2 x pairs, length]: all chosen, then the rest."""
    rows = [
        {name: sample[f"{side}_{name}"] for name in ("input_ids", "labels")}
        for side in ("chosen", "rejected")
        for sample in samples
    ]
    return {**pad(rows, "input_ids", filler), "labels": pad(rows, "labels", IGNORED)["labels"]}


def counted_pairs(labels: Tensor) -> Tensor:
    """Which pairs count, bool [pairs]: a pair that only fills up a batch has no label."""
    return (labels != IGNORED).any(dim=1).chunk(2)[0]


def preference_losses(
    section: PreferenceSection,
    policy: tuple[Tensor, Tensor],
    reference: tuple[Tensor, Tensor],
    lengths: tuple[Tensor, Tensor],
) -> Tensor:
    """Loss of each pair, without ORPO's likelihood of the chosen answer.

    Args:
        section: method and constants.
        policy: sums of the log-probabilities of chosen and rejected answers, [pairs] each.
        reference: the same of the model as it was; not read by ORPO and SimPO.
        lengths: tokens of the answers.
    """
    beta = section.beta
    if section.method == "dpo":
        return -F.logsigmoid(beta * ((policy[0] - reference[0]) - (policy[1] - reference[1])))
    chosen, rejected = policy[0] / lengths[0], policy[1] / lengths[1]
    if section.method == "ipo":
        return (chosen - reference[0] / lengths[0] - rejected + reference[1] / lengths[1] - 1 / (2 * beta)) ** 2
    if section.method == "simpo":
        return -F.logsigmoid(beta * (chosen - rejected) - section.gamma)
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * F.logsigmoid(odds)


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exactly on both sides of -log 2 (Maechler 2012)."""
    return torch.where(values > -0.6931472, torch.log(-torch.expm1(values)), torch.log1p(-torch.exp(values)))


class _PairScores(ReferenceScores):
    """Those of both answers of a pair."""

    names = ("chosen_reference", "rejected_reference")

    def score(self, model: Any, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over the answers' tokens."""
        sums = answer_sums(logits_of(model, batch["input_ids"]), batch["labels"]).chunk(2)
        return dict(zip(self.names, sums, strict=True))


class Preference(Task):
    """DPO, IPO, ORPO and SimPO on a causal language model."""

    auto_class = AutoModelForCausalLM
    adapter_task = "CAUSAL_LM"
    has_metrics = True

    def __init__(self, plan: Plan, facts: Mapping[str, Any]) -> None:
        super().__init__(plan, facts)
        self.section = plan.recipe.preference
        self._copy: Any = None

    @classmethod
    def encoder(cls, recipe: Recipe) -> PairEncoder:
        """Make the encoder of the recipe."""
        return PairEncoder(recipe)

    @classmethod
    def derivations(cls, recipe: Recipe, prepared: PreparedData) -> list[Derivation]:
        """What the reference says of the answers, where it is to be computed once."""
        found = super().derivations(recipe, prepared)
        if recipe.task == "preference" and recipe.preference.precompute_reference:
            filler = prepared.facts["pad_token_id"]
            scores = _PairScores(recipe, prepared, cls.auto_class, lambda samples: collate_pairs(samples, filler))
            found.append(Annotations(scores))
        return found

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad the pairs, see `collate_pairs`; with `reference`, [2 x pairs], where that was computed ahead."""
        batch = collate_pairs(samples, self.facts["pad_token_id"])
        del batch["attention_mask"]  # nothing looks ahead to the padding
        if self.section.precompute_reference:
            sums = [sample[name] for name in _PairScores.names for sample in samples]
            batch["reference"] = torch.from_numpy(np.stack(sums))
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Count the pairs."""
        return int(counted_pairs(batch["labels"]).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Loss of the method, summed over pairs, in fp32.

        ORPO's mean log-likelihood of the chosen answers is that over their tokens (and the prompts') in this micro
        batch, as in TRL.
        """
        ids, labels = batch["input_ids"], batch["labels"]
        counted = counted_pairs(labels)
        logits = logits_of(model, ids)
        log_probabilities = answer_sums(logits, labels)
        lengths = (labels[:, 1:] != IGNORED).sum(dim=1).clamp(min=1).chunk(2)
        reference = torch.zeros_like(log_probabilities)
        if "reference" in batch:
            reference = batch["reference"]
        elif self.section.has_reference:
            with torch.no_grad(), self._reference(model) as fixed:
                reference = answer_sums(logits_of(fixed, ids), labels)
        policy, other = log_probabilities.chunk(2), reference.chunk(2)
        losses = preference_losses(self.section, (policy[0], policy[1]), (other[0], other[1]), (lengths[0], lengths[1]))
        loss_sum = torch.where(counted, losses, 0.0).sum()
        if self.section.method == "orpo":
            loss_sum = loss_sum + counted.sum() * self._likelihood(logits, batch)
        scale = 1.0 if self.section.has_reference else 1 / torch.stack(lengths)
        rewards = self.section.beta * (log_probabilities - reference).detach().view(2, -1) * scale
        predictions = {"chosen_reward": rewards[0], "rejected_reward": rewards[1]}
        return LossOutput(loss_sum, counted.sum(), predictions=predictions)

    def _likelihood(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean cross-entropy of the chosen texts, prompt and answer."""
        pairs = len(logits) // 2
        ids, labels = batch["input_ids"][:pairs], batch["labels"][:pairs]
        # An answer ends its text: positions up to its last label are text, later ones padding.
        text = (labels != IGNORED).flip(1).cumsum(dim=1).flip(1) > 0
        targets = torch.where(text, ids, IGNORED)
        total = F.cross_entropy(
            logits[:pairs, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total / (targets[:, 1:] != IGNORED).sum().clamp(min=1)  # a batch may hold nothing but fillers

    @contextmanager
    def _reference(self, model: Any) -> Iterator[Any]:
        """The model as it was before training: without its adapter, or a copy of its own."""
        module = getattr(model, "module", model)
        if self.plan.recipe.adapter is not None:
            was_training = module.training
            module.eval()
            with module.disable_adapter():
                yield model
            module.train(was_training)
            return
        if self._copy is None:
            whole = self.plan.model_copy(update={"zero_stage": 0})
            parameter = next(module.parameters())
            self._copy = build_model(whole, self.auto_class).to(parameter.device, parameter.dtype).eval()
            self._copy.requires_grad_(False)
        yield self._copy

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """How often, and by how much, the chosen answer is preferred."""
        return _pair_metrics(predictions)


def _pair_metrics(predictions: list[dict[str, NDArray[Any]]]) -> Metrics:
    margins = [float(each["chosen_reward"] - each["rejected_reward"]) for each in predictions]
    right = [float(margin > 0) for margin in margins]
    return Metrics({"reward_accuracy": sum(right) / len(right), "reward_margin": sum(margins) / len(margins)})


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits [rows, length, vocabulary] in fp32, without those of an adapter's prompt."""
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[:, -ids.shape[1] :].float()


def answer_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the log-probabilities of each row's labelled tokens, [rows]."""
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -each.view(len(labels), -1).sum(dim=1)


class RewardModel(Task):
    """A number for an answer, higher for the better one of each pair (Bradley and Terry 1952)."""

    auto_class = AutoModelForSequenceClassification
    adapter_task = "SEQ_CLS"
    has_metrics = True

    @classmethod
    def encoder(cls, recipe: Recipe) -> PairEncoder:
        """Make the encoder of the recipe."""
        return PairEncoder(recipe)

    def config(self) -> Any:
        """Return the model's config with one output."""
        return with_labels(super().config(), "regression", {**self.facts, "labels": []})

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad the pairs; see `collate_pairs`."""
        return collate_pairs(samples, self.facts["pad_token_id"])

    def num_targets(self, batch: Batch) -> int:
        """Count the pairs."""
        return int(counted_pairs(batch["labels"]).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Minus the log-probability that the chosen answer is the better one, summed over pairs."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        chosen, rejected = logits.squeeze(-1).float().chunk(2)
        counted = counted_pairs(batch["labels"])
        loss_sum = torch.where(counted, -F.logsigmoid(chosen - rejected), 0.0).sum()
        predictions = {"chosen_reward": chosen.detach(), "rejected_reward": rejected.detach()}
        return LossOutput(loss_sum, counted.sum(), predictions=predictions)

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """How often, and by how much, the chosen answer gets the larger number."""
        return _pair_metrics(predictions)
