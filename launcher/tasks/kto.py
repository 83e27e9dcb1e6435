"""KTO: learning from answers that are each called good or bad, without pairs (Ethayarajh et al., arXiv 2402.01306)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from launcher.data.derived import Annotations, Derivation
from launcher.data.examples import BadExample, EncodingError, Example, Field, Row
from launcher.data.store import PreparedData
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.tasks.asking import tokens_of
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample
from launcher.tasks.conversations import IGNORED, ConversationEncoder
from launcher.tasks.padding import pad
from launcher.tasks.preference import Preference, answer_sums, logits_of
from launcher.tasks.reference import BYTES_PER_NUMBER, ReferenceScores
from launcher.tasks.together import summed

DESIRABLE = {"true": 1, "1": 1, "1.0": 1, "false": 0, "0": 0, "0.0": 0}


class AnswerEncoder:
    """Rows with `prompt`, `completion` and `label`, which says whether the completion is a good one."""

    roles: tuple[str, ...] = ("prompt", "completion", "label")
    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.one = ConversationEncoder(recipe)

    def identity(self) -> Any:
        """Nothing but what counts anyway."""
        return []

    def texts(self, row: Row) -> list[str]:
        """Prompt and completion."""
        return self.one.texts(row)

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Check the tokenizer, and that there are answers of both kinds."""
        self.one.begin(tokenizer, training_rows)
        kinds = {_desirable(row) for rows in training_rows for row in rows} - {None}
        if len(kinds) == 1:
            raise EncodingError(f"every label says {bool(kinds.pop())}: KTO learns from good answers and from bad ones")

    def fields(self) -> dict[str, Field]:
        """Tokens, the completion's as labels, and whether it is good."""
        return {**self.one.fields(), "desirable": Field("uint8", ())}

    def encode(self, rows: Sequence[Row]) -> list[Example | BadExample]:
        """Tokenise, the prompt by itself, as it will be when the model is used."""
        return [self._example(row) for row in rows]

    def _example(self, row: Row) -> Example | BadExample:
        desirable = _desirable(row)
        if desirable is None:
            return BadExample("its label is neither true nor false")
        one = self.one.completion(row)
        return one if isinstance(one, BadExample) else {**one, "desirable": np.array(desirable, np.uint8)}

    def facts(self) -> dict[str, Any]:
        """What fills up a batch."""
        return self.one.facts()


def _desirable(row: Row) -> int | None:
    return DESIRABLE.get(str(row["label"]).strip().lower())


class _AnswerScores(ReferenceScores):
    """Those of each answer, and of the answer of the sample before after the same prompt."""

    names = ("reference", "other_reference")

    def fields(self) -> dict[str, Field]:
        """The scores, and the mismatched text."""
        return {**super().fields(), "other_input_ids": Field("uint32"), "other_labels": Field("int32")}

    def bytes_of(self, dataset: Sequence[Any]) -> int:
        """The scores and the mismatched text, about as long as the sample."""
        return super().bytes_of(dataset) + tokens_of(dataset) * 2 * BYTES_PER_NUMBER

    def extras(self, dataset: Sequence[Any], row: int) -> Example:
        """The prompt with the answer of the sample before; before the first one stands the last."""
        mismatched = _mismatched(dataset[row], dataset[row - 1])
        return {f"other_{name}": values for name, values in mismatched.items()}

    def score(self, model: Any, batch: Batch) -> Mapping[str, Tensor]:
        """Sums over the answers' tokens."""
        return {
            "reference": answer_sums(logits_of(model, batch["input_ids"]), batch["labels"]),
            "other_reference": answer_sums(logits_of(model, batch["other_input_ids"]), batch["other_labels"]),
        }


class Kto(Preference):
    """KTO on a causal language model, with the same reference as DPO."""

    def __init__(self, plan: Plan, facts: Mapping[str, Any]) -> None:
        super().__init__(plan, facts)
        self.kto = plan.recipe.kto
        if plan.batch.micro_batch_size < 2:
            raise RecipeError.single(
                "training.micro_batch_size",
                "is 1, but KTO estimates how far the model is from its reference with the answers of other samples in "
                "the same micro batch; set it to 2 or more",
            )

    @classmethod
    def encoder(cls, recipe: Recipe) -> Any:
        """Make the encoder of the recipe."""
        return AnswerEncoder(recipe)

    @classmethod
    def derivations(cls, recipe: Recipe, prepared: PreparedData) -> list[Derivation]:
        """What the reference says of the answers, where it is to be computed once."""
        found = super().derivations(recipe, prepared)
        if recipe.kto.precompute_reference:
            filler = prepared.facts["pad_token_id"]
            scores = _AnswerScores(recipe, prepared, cls.auto_class, lambda samples: padded(samples, filler))
            found.append(Annotations(scores))
        return found

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad, and give each prompt the answer of the sample before, as TRL does.

        Where the reference was asked ahead, that is the sample before in the data; otherwise in the micro batch.

        Returns:
            `input_ids`, `labels` and the same of the mismatched texts with `other_` before their names, int64 [samples,
            length]; `desirable`, bool [samples]; `reference` and `other_reference`, float [samples], if they are known.
        """
        if self.kto.precompute_reference:
            batch = padded(samples, self.facts["pad_token_id"])
            for name in _AnswerScores.names:
                batch[name] = torch.from_numpy(np.stack([sample[name] for sample in samples]))
            return batch
        counted = [sample for sample in samples if (sample["labels"] != IGNORED).any()]
        before = dict(zip(map(id, counted), counted[-1:] + counted[:-1], strict=True))
        others = [_mismatched(sample, before.get(id(sample), sample)) for sample in samples]
        named = [{f"other_{name}": values for name, values in other.items()} for other in others]
        whole = [{**sample, **other} for sample, other in zip(samples, named, strict=True)]
        return padded(whole, self.facts["pad_token_id"])

    def num_targets(self, batch: Batch) -> int:
        """Count the answers."""
        return int(_counted(batch).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """One minus the value of each answer, summed, in fp32 (equation 7 of the article).

        The distance of the model from its reference, from which gains and losses are told, is estimated on the micro
        batches of all ranks together, and no gradient goes through it.
        """
        counted, desirable = _counted(batch), batch["desirable"]
        policy = answer_sums(logits_of(model, batch["input_ids"]), batch["labels"])
        with torch.no_grad():
            others = answer_sums(logits_of(model, batch["other_input_ids"]), batch["other_labels"])
            if "reference" in batch:
                reference, other_reference = batch["reference"], batch["other_reference"]
            else:
                with self._reference(model) as fixed:
                    reference = answer_sums(logits_of(fixed, batch["input_ids"]), batch["labels"])
                    other_reference = answer_sums(logits_of(fixed, batch["other_input_ids"]), batch["other_labels"])
            others = others - other_reference
        total, count = summed(torch.stack([torch.where(counted, others, 0.0).sum(), counted.sum().to(others.dtype)]))
        distance = (total / count.clamp(min=1)).clamp(min=0)
        losses = kto_losses(policy - reference, distance, desirable, self.kto.beta)
        weights = torch.where(desirable, self.kto.desirable_weight, self.kto.undesirable_weight)
        predictions = {"reward": self.kto.beta * (policy - reference).detach(), "desirable": desirable}
        return LossOutput(torch.where(counted, weights * losses, 0.0).sum(), counted.sum(), predictions=predictions)

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """Whether good answers have larger rewards than bad ones."""
        from sklearn.metrics import roc_auc_score

        rewards = np.array([float(each["reward"]) for each in predictions])
        good = np.array([bool(each["desirable"]) for each in predictions])
        if good.all() or not good.any():
            return Metrics()
        margin = float(rewards[good].mean() - rewards[~good].mean())
        return Metrics({"reward_margin": margin, "roc_auc": float(roc_auc_score(good, rewards))})


def kto_losses(log_ratios: Tensor, distance: Tensor, desirable: Tensor, beta: float) -> Tensor:
    """Loss of each answer.

    Args:
        log_ratios: of the answers' probabilities under the model and its reference, [answers].
        distance: estimate of the Kullback-Leibler divergence between the two, scalar, at least 0.
        desirable: bool [answers].
        beta: how sharply gains and losses level off.
    """
    gains = torch.where(desirable, log_ratios - distance, distance - log_ratios)
    return 1 - torch.sigmoid(beta * gains)


def padded(samples: Sequence[Sample], filler: int) -> Batch:
    """Pad answers and mismatched ones; see `Kto.collate`."""
    batch: Batch = {"desirable": torch.tensor([bool(sample["desirable"]) for sample in samples])}
    for prefix in ("", "other_"):
        batch[f"{prefix}input_ids"] = pad(samples, f"{prefix}input_ids", filler)[f"{prefix}input_ids"]
        batch[f"{prefix}labels"] = pad(samples, f"{prefix}labels", IGNORED)[f"{prefix}labels"]
    return batch


def _counted(batch: Batch) -> Tensor:
    """Which answers count, bool [answers]: one that only fills up a batch has no label."""
    return (batch["labels"] != IGNORED).any(dim=1)


def _mismatched(sample: Sample, other: Sample) -> dict[str, NDArray[Any]]:
    """One sample's prompt with the answer of another one."""
    prompt = sample["input_ids"][sample["labels"] == IGNORED]
    answer = other["input_ids"][other["labels"] != IGNORED]
    labels = np.concatenate([np.full(len(prompt), IGNORED, np.int32), answer.astype(np.int32)])
    return {"input_ids": np.concatenate([prompt, answer]), "labels": labels}
