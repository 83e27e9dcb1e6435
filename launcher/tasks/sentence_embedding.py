"""Sentence embeddings: texts that belong together come near each other, and all others of the batch away from them."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel

from launcher.data.examples import BadExample, Example, Field, Row
from launcher.data.store import IGNORED
from launcher.recipe.schema import Recipe
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.padding import pad, padding_token
from launcher.tasks.together import first_row, gathered

SIDES = ("anchor", "positive", "negative")


class SentencePairEncoder:
    """Rows with `anchor`, `positive` and perhaps `negative`, all text."""

    roles: tuple[str, ...] = ("anchor", "positive")
    optional_roles: tuple[str, ...] = ("negative",)

    def __init__(self, recipe: Recipe) -> None:
        self.length = recipe.data.sequence_length
        self.tokenizer: Any = None
        self.sides: tuple[str, ...] = self.roles

    def identity(self) -> Any:
        """Nothing but what counts anyway."""
        return []

    def texts(self, row: Row) -> list[str]:
        """All that there are."""
        return [str(row[side] or "") for side in SIDES if side in row]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Check the tokenizer, and see whether there are negatives."""
        self.tokenizer = tokenizer
        padding_token(tokenizer)
        if any("negative" in row for rows in training_rows for row in rows[:1]):
            self.sides = SIDES

    def fields(self) -> dict[str, Field]:
        """Tokens of each text; and whether the row counts."""
        return {**{f"{side}_ids": Field("uint32") for side in self.sides}, "labels": Field("int64", ())}

    def encode(self, rows: Sequence[Row]) -> list[Example | BadExample]:
        """Tokenise each text by itself."""
        return [self._example(row) for row in rows]

    def _example(self, row: Row) -> Example | BadExample:
        texts = [str(row.get(side) or "") for side in self.sides]
        if not all(text.strip() for text in texts):
            return BadExample(f"its {' or '.join(self.sides)} is empty")
        encoded = self.tokenizer(texts, truncation=True, max_length=self.length)["input_ids"]
        ids = {f"{side}_ids": np.array(one, np.uint32) for side, one in zip(self.sides, encoded, strict=True)}
        return {**ids, "labels": np.array(0, np.int64)}

    def facts(self) -> dict[str, Any]:
        """What fills up a batch, and which texts a row has."""
        return {"pad_token_id": padding_token(self.tokenizer), "sides": list(self.sides)}


class SentenceEmbedding(Task):
    """An encoder whose mean over a text's tokens is the text's place (Reimers and Gurevych, arXiv 1908.10084)."""

    auto_class = AutoModel
    adapter_task = "FEATURE_EXTRACTION"
    has_metrics = True

    @classmethod
    def encoder(cls, recipe: Recipe) -> SentencePairEncoder:
        """Make the encoder of the recipe."""
        return SentencePairEncoder(recipe)

    def build_model(self) -> torch.nn.Module:
        """Build the model; what some families pool a text by is not used, so it is not trained either."""
        model = super().build_model()
        for name, parameter in model.named_parameters():
            if "pooler." in name:
                parameter.requires_grad_(False)
        return model

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad `input_ids` and `attention_mask`, int64 [texts x samples, length]: all anchors, then the rest."""
        rows = [{"input_ids": sample[f"{side}_ids"]} for side in self.facts["sides"] for sample in samples]
        labels = torch.tensor([int(sample["labels"]) for sample in samples])
        return {**pad(rows, "input_ids", self.facts["pad_token_id"]), "labels": labels}

    def num_targets(self, batch: Batch) -> int:
        """Count the anchors."""
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Cross-entropy of finding each anchor's positive, summed over anchors, in fp32.

        It is sought among the positives, and the negatives, of the micro batches of all ranks together; see
        `contrastive_loss`.
        """
        mask = batch["attention_mask"]
        states = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        places = mean_pooled(states.float(), mask)
        anchors, *candidates = places.chunk(len(self.facts["sides"]))
        counted = batch["labels"] != IGNORED
        loss_sum = contrastive_loss(anchors, candidates, counted, self.plan.recipe.embedding.temperature)
        predictions = {"anchor": anchors.detach(), "positive": candidates[0].detach()}
        return LossOutput(loss_sum, counted.sum(), predictions=predictions)

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """How well each anchor's positive is found among all positives of the evaluation."""
        anchors = np.stack([each["anchor"] for each in predictions])
        positives = np.stack([each["positive"] for each in predictions])
        ranks = places_among(anchors, positives)
        found = {f"recall_at_{k}": float((ranks < k).mean()) for k in (1, 5)}
        return Metrics({"mean_reciprocal_rank": float((1 / (ranks + 1)).mean()), **found})


def places_among(anchors: NDArray[Any], positives: NDArray[Any]) -> NDArray[np.int64]:
    """How many positives are nearer to each anchor than its own one, [samples]; both are [samples, width]."""
    return np.concatenate(
        [_ranks(anchors[start : start + 1024], positives, start) for start in range(0, len(anchors), 1024)]
    )


def _ranks(anchors: NDArray[Any], positives: NDArray[Any], start: int) -> NDArray[np.int64]:
    """How many positives are nearer to each anchor than its own one."""
    scores = anchors @ positives.T
    own = scores[np.arange(len(anchors)), np.arange(start, start + len(anchors))]
    ranks: NDArray[np.int64] = (scores > own[:, None]).sum(axis=1)
    return ranks


def mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the hidden states [texts, length, width] where `mask` is 1, scaled to length 1: [texts, width]."""
    weights = mask.unsqueeze(-1).to(states.dtype)
    return F.normalize((states * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1), dim=-1)


def contrastive_loss(
    anchors: Tensor, candidates: Sequence[Tensor], counted: Tensor, temperature: float | Tensor
) -> Tensor:
    """Sum over this rank's anchors of the cross-entropy of their positives among all ranks' candidates.

    Summed over ranks it is the loss of one process with all samples (InfoNCE, van den Oord et al., arXiv 1807.03748),
    and so are the gradients.

    Args:
        anchors: of length 1, [samples, width].
        candidates: the positives of the same samples, then perhaps negatives, of the same form.
        counted: which samples count, bool [samples]; the others are no candidates either.
        temperature: cosines are divided by it.
    """
    kinds = len(candidates)
    everyone = gathered(torch.stack(list(candidates), dim=1)).flatten(0, 1)
    present = gathered(counted.to(anchors.dtype)).repeat_interleave(kinds) > 0
    logits = (anchors @ everyone.T / temperature).masked_fill(~present, -torch.inf)
    targets = kinds * (first_row(anchors) + torch.arange(len(anchors), device=anchors.device))
    # A sample that does not count has no candidate of its own: its cross-entropy would be infinite.
    return F.cross_entropy(logits[counted], targets[counted], reduction="sum")
