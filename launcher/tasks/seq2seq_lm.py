"""Sequence to sequence (T5, BART): translation, summarisation and the like."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from launcher.data.examples import BadExample, EncodingError, Example, Field, Row
from launcher.recipe.schema import Recipe
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.padding import pad, padding_token
from launcher.tasks.text_metrics import text_metrics

IGNORED = -100
"""Label of a position that is no target, as in transformers."""
SHOWN = 8
"""Written texts in an evaluation's report."""


class SequenceToSequenceEncoder:
    """Rows with `source` and `target`."""

    roles: tuple[str, ...] = ("source", "target")
    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.length = recipe.data.sequence_length
        self.prefix = recipe.seq2seq.source_prefix
        self.tokenizer: Any = None

    def identity(self) -> Any:
        """What is put before each source, and the form of the examples."""
        return [self.prefix, "target"]

    def texts(self, row: Row) -> list[str]:
        """Both texts."""
        return [str(row["source"] or ""), str(row["target"] or "")]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Check the tokenizer."""
        self.tokenizer = tokenizer
        padding_token(tokenizer)

    def fields(self) -> dict[str, Field]:
        """Tokens of both, and the target's text, which may be longer than its tokens here."""
        return {"input_ids": Field("uint32"), "labels": Field("int64"), "target": Field("uint8")}

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
        text = np.frombuffer(target.encode(), np.uint8)
        return {"input_ids": np.array(ids, np.uint32), "labels": np.array(labels, np.int64), "target": text}

    def facts(self) -> dict[str, Any]:
        """Padding, and what ends a target."""
        return {"pad_token_id": padding_token(self.tokenizer), "end_token_id": end_of_target(self.tokenizer)}


def end_of_target(tokenizer: Any) -> int | None:
    """Token with which the tokenizer ends a target (T5's `</s>`, say), so that a model learns to stop with it.

    `None` where it ends none: then the model writes as many tokens as it may.
    """
    last = tokenizer(text_target="a")["input_ids"][-1]
    return int(last) if last in tokenizer.all_special_ids else None


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
        config.eos_token_id = self.facts["end_token_id"]
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

    @cached_property
    def tokenizer(self) -> Any:
        """Of the run, to read what the model writes."""
        return AutoTokenizer.from_pretrained(self.facts["tokenizer_directory"])

    @property
    def writes(self) -> bool:
        """Whether written texts are compared with the targets."""
        return bool(self.plan.recipe.seq2seq.metrics)

    @torch.no_grad()
    def written(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Tokens that the model writes for each source, always the most probable one: int64 [samples, tokens].

        Under ZeRO 3 every rank needs every other one for each token, so all go on until the last one is done.
        """
        plain = getattr(model, "module", model)
        tokens = plain.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=self.plan.recipe.seq2seq.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            decoder_start_token_id=self.plan_start(model),
            pad_token_id=self.facts["pad_token_id"],
            eos_token_id=self.facts["end_token_id"],
            synced_gpus=self.plan.zero_stage == 3,
        )
        return {"written": tokens[:, 1:]}

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """Share of the target tokens that are the most probable ones, given the true ones before them.

        And `seq2seq.metrics` of what the model writes by itself, compared with the whole targets.
        """
        right, tokens = (sum(int(each[name]) for each in predictions) for name in ("right", "tokens"))
        values = {"token_accuracy": right / max(tokens, 1)}
        if not self.writes:
            return Metrics(values)
        written = [self._text(each["written"]) for each in predictions]
        targets = [bytes(samples[index]["target"]).decode() for index in range(len(written))]
        values |= text_metrics(written, targets, self.plan.recipe.seq2seq.metrics)
        shown = [
            {"source": self._text(samples[index]["input_ids"]), "target": targets[index], "written": written[index]}
            for index in range(min(SHOWN, len(written)))
        ]
        return Metrics(values, {"samples": shown})

    def answers(self, predictions: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
        """The text that the model writes for each source."""
        return [{"text": self._text(tokens)} for tokens in predictions["written"]]

    def _text(self, tokens: NDArray[Any]) -> str:
        text: str = self.tokenizer.decode(tokens.astype(np.int64).tolist(), skip_special_tokens=True)
        return text
