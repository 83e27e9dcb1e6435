"""Sequence to sequence (T5, BART): translation, summarisation and the like."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from numpy.typing import NDArray
from transformers import AutoModelForSeq2SeqLM

from launcher.data.examples import BadExample, EncodingError, Example, Field, Row
from launcher.recipe.schema import Recipe
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.padding import pad, padding_token

IGNORED = -100
"""Label of a position that is no target, as in transformers."""


class SequenceToSequenceEncoder:
    """Rows with `source` and `target`."""

    roles: tuple[str, ...] = ("source", "target")
    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.length = recipe.data.sequence_length
        self.prefix = recipe.seq2seq.source_prefix
        self.tokenizer: Any = None

    def identity(self) -> Any:
        """What is put before each source."""
        return self.prefix

    def texts(self, row: Row) -> list[str]:
        """Both texts."""
        return [str(row["source"] or ""), str(row["target"] or "")]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Check the tokenizer."""
        self.tokenizer = tokenizer
        padding_token(tokenizer)

    def fields(self) -> dict[str, Field]:
        """Tokens of both."""
        return {"input_ids": Field("uint32"), "labels": Field("int64")}

    def encode(self, rows: Sequence[Row]) -> list[Example | BadExample]:
        """Tokenise; both are cut to `sequence_length`."""
        return [self._example(*self.texts(row)) for row in rows]

    def _example(self, source: str, target: str) -> Example | BadExample:
        if not source.strip() or not target.strip():
            return BadExample("its source or its target is empty")
        options = {"truncation": True, "max_length": self.length}
        ids = self.tokenizer(self.prefix + source, **options)["input_ids"]
        labels = self.tokenizer(text_target=target, **options)["input_ids"]
        if not labels:
            raise EncodingError("the tokenizer makes no token of a text that is not empty")
        return {"input_ids": np.array(ids, np.uint32), "labels": np.array(labels, np.int64)}

    def facts(self) -> dict[str, Any]:
        """Padding."""
        return {"pad_token_id": padding_token(self.tokenizer)}


class SequenceToSequence(Task):
    """`AutoModelForSeq2SeqLM`."""

    auto_class = AutoModelForSeq2SeqLM
    adapter_task = "SEQ_2_SEQ_LM"
    has_metrics = True

    @classmethod
    def encoder(cls, recipe: Recipe) -> SequenceToSequenceEncoder:
        """Make the encoder of the recipe."""
        return SequenceToSequenceEncoder(recipe)

    def config(self) -> Any:
        """Return the model's config; a decoder that does not say how it begins begins with padding, as T5's."""
        config = super().config()
        config.pad_token_id = self.facts["pad_token_id"]
        if getattr(config, "decoder_start_token_id", None) is None:
            config.decoder_start_token_id = self.facts["pad_token_id"]
        return config

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad both sides: `input_ids`, `attention_mask` [samples, length], `labels` [samples, target length]."""
        batch = pad(samples, "input_ids", self.facts["pad_token_id"])
        batch["labels"] = pad(samples, "labels", IGNORED)["labels"]
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Count the target tokens."""
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Cross-entropy in nats of the target tokens, summed, in fp32."""
        labels = batch["labels"]
        start = self.plan_start(model)
        decoder = labels.new_full(labels.shape, start)
        decoder[:, 1:] = labels[:, :-1].masked_fill(labels[:, :-1] == IGNORED, self.facts["pad_token_id"])
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=decoder,
            use_cache=False,
        ).logits.float()
        counted = labels != IGNORED
        options: dict[str, Any] = {"ignore_index": IGNORED, "reduction": "none"}
        each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options).view_as(labels)
        smoothing = self.plan.recipe.seq2seq.label_smoothing
        loss_sum = each.sum()
        if smoothing and model.training:
            options["label_smoothing"] = smoothing
            loss_sum = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **options).sum()
        predictions = {
            "right": ((logits.detach().argmax(dim=-1) == labels) & counted).sum(dim=1),
            "tokens": counted.sum(dim=1),
        }
        return LossOutput(loss_sum, counted.sum(), predictions=predictions)

    def plan_start(self, model: Any) -> int:
        """Token with which the decoder begins."""
        return int(getattr(model, "module", model).config.decoder_start_token_id)

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """Share of the target tokens that are the most probable ones, given the true ones before them."""
        right, tokens = (sum(int(each[name]) for each in predictions) for name in ("right", "tokens"))
        return Metrics({"token_accuracy": right / max(tokens, 1)})
