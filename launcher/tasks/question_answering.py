"""Extractive question answering (SQuAD): the first and the last token of the answer in its context."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from numpy.typing import NDArray
from transformers import AutoModelForQuestionAnswering
from xxhash import xxh3_64_intdigest

from launcher.data.examples import BadExample, Example, Field, Row
from launcher.recipe.schema import Recipe
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.padding import pad, padding_token
from launcher.tasks.sequence_classification import reads_token_types

IGNORED = -100
"""Label of a sample that does not count, as in transformers."""
BETWEEN = "\x1f"
"""Between the true answers, where they are kept as text."""
LONGEST_ANSWER = 30
"""Tokens; as in the scripts that go with SQuAD."""


class QuestionAnsweringEncoder:
    """Rows with `question`, `context` and `answers` (`{text: [...], answer_start: [...]}`, as in SQuAD).

    A context that is too long gives several samples, which overlap by half a window. Where the answer is not in a
    window, or there is none, the sample's answer is its first token.
    """

    roles: tuple[str, ...] = ("question", "context", "answers")
    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.length = recipe.data.sequence_length
        self.tokenizer: Any = None

    def identity(self) -> Any:
        """Nothing but the length, which counts anyway."""
        return []

    def texts(self, row: Row) -> list[str]:
        """Question and context."""
        return [str(row["question"] or ""), str(row["context"] or "")]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Check the tokenizer."""
        self.tokenizer = tokenizer
        padding_token(tokenizer)

    def fields(self) -> dict[str, Field]:
        """Tokens, the answer, and what it takes to read an answer from the context again."""
        return {
            "input_ids": Field("uint32"),
            "token_type_ids": Field("uint8"),
            "labels": Field("int64", (2,)),
            "row": Field("uint64", ()),
            "offsets": Field("int32"),
            "context": Field("uint8"),
            "answers": Field("uint8"),
        }

    def encode(self, rows: Sequence[Row]) -> Sequence[Example | list[Example] | BadExample]:
        """Tokenise and find the answers."""
        return [self._examples(row) for row in rows]

    def _examples(self, row: Row) -> list[Example] | BadExample:
        question, context = self.texts(row)
        answers = row["answers"] or {}
        texts, starts = list(answers.get("text") or ()), list(answers.get("answer_start") or ())
        if not question.strip() or not context.strip():
            return BadExample("its question or its context is empty")
        for text, start in zip(texts, starts, strict=False):
            if context[start : start + len(text)] != text or not text:
                return BadExample("its answer does not stand where answer_start says")
        span = (starts[0], starts[0] + len(texts[0])) if texts and starts else None
        room = self.length - len(self.tokenizer(question)["input_ids"])
        if room < 8:
            return BadExample("its question leaves no room for the context within data.sequence_length")
        encoded = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.length,
            stride=room // 2 - 2,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_token_type_ids=True,
        )
        made: list[Example] = []
        for index, ids in enumerate(encoded["input_ids"]):
            inside = np.array([part == 1 for part in encoded.sequence_ids(index)])
            offsets = np.array(encoded["offset_mapping"][index], np.int32)
            offsets[~inside] = -1
            made.append(
                {
                    "input_ids": np.array(ids, np.uint32),
                    "token_type_ids": np.array(encoded["token_type_ids"][index], np.uint8),
                    "labels": np.array(_positions(offsets, span), np.int64),
                    "row": np.array(xxh3_64_intdigest(f"{question}\x1e{context}".encode()), np.uint64),
                    "offsets": offsets.ravel(),
                    "context": np.frombuffer(context.encode(), np.uint8),
                    "answers": np.frombuffer(BETWEEN.join(texts).encode(), np.uint8),
                }
            )
        return made

    def facts(self) -> dict[str, Any]:
        """Padding."""
        return {"pad_token_id": padding_token(self.tokenizer)}


def _positions(offsets: NDArray[np.int32], span: tuple[int, int] | None) -> tuple[int, int]:
    """First and last token of an answer; (0, 0) where it is not whole in these tokens."""
    if span is None:
        return 0, 0
    first = np.flatnonzero((offsets[:, 0] <= span[0]) & (offsets[:, 1] > span[0]) & (offsets[:, 0] >= 0))
    last = np.flatnonzero((offsets[:, 0] < span[1]) & (offsets[:, 1] >= span[1]) & (offsets[:, 0] >= 0))
    return (int(first[0]), int(last[-1])) if len(first) and len(last) else (0, 0)


class QuestionAnswering(Task):
    """Two numbers a token, for beginning and end: `AutoModelForQuestionAnswering`."""

    auto_class = AutoModelForQuestionAnswering
    adapter_task = "QUESTION_ANS"
    has_metrics = True

    @classmethod
    def encoder(cls, recipe: Recipe) -> QuestionAnsweringEncoder:
        """Make the encoder of the recipe."""
        return QuestionAnsweringEncoder(recipe)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad: `input_ids`, `attention_mask`, `token_type_ids`, `inside` [samples, length]; `labels` [samples, 2]."""
        batch = pad(samples, "input_ids", self.facts["pad_token_id"])
        batch["token_type_ids"] = pad(samples, "token_type_ids", 0)["token_type_ids"]
        inside = [{"inside": (sample["offsets"].reshape(-1, 2)[:, 0] >= 0).astype(np.int64)} for sample in samples]
        batch["inside"] = pad(inside, "inside", 0)["inside"]
        batch["labels"] = torch.from_numpy(np.stack([sample["labels"] for sample in samples]))
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Count the samples that have an answer (or are known to have none)."""
        return int((batch["labels"][:, 0] != IGNORED).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Mean of the cross-entropies of beginning and end, summed over samples, in fp32."""
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if reads_token_types(model):
            inputs["token_type_ids"] = batch["token_type_ids"]
        output = model(**inputs)
        logits, labels = (output.start_logits.float(), output.end_logits.float()), batch["labels"]
        parts = [
            F.cross_entropy(each, labels[:, side], ignore_index=IGNORED, reduction="sum")
            for side, each in enumerate(logits)
        ]
        predictions = {"start": logits[0].detach(), "end": logits[1].detach(), "inside": batch["inside"]}
        return LossOutput((parts[0] + parts[1]) / 2, (labels[:, 0] != IGNORED).sum(), predictions=predictions)

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """Exact match and F1 of words, as SQuAD counts them: the best span of all windows of a row."""
        best: dict[int, tuple[float, str, list[str]]] = {}
        for each, sample in zip(predictions, samples, strict=True):
            score, answer = best_answer(each, sample)
            row = int(sample["row"])
            if row not in best or score > best[row][0]:
                text = sample["answers"].tobytes().decode()
                best[row] = score, answer, text.split(BETWEEN) if text else [""]
        pairs = [(answer, answers) for _, answer, answers in best.values()]
        exact = [max(float(normalized(answer) == normalized(true)) for true in answers) for answer, answers in pairs]
        f1 = [max(word_f1(answer, true) for true in answers) for answer, answers in pairs]
        return Metrics({"exact_match": float(np.mean(exact)), "f1": float(np.mean(f1)), "rows": float(len(pairs))})


def best_answer(prediction: Mapping[str, NDArray[Any]], sample: Sample) -> tuple[float, str]:
    """The most probable span of a window that lies in its context, and how much likelier it is than no answer."""
    offsets = sample["offsets"].reshape(-1, 2)
    count = len(offsets)
    start, end = prediction["start"][:count].astype(np.float64), prediction["end"][:count].astype(np.float64)
    inside = prediction["inside"][:count].astype(bool)
    scores = np.where(inside, start, -np.inf)[:, None] + np.where(inside, end, -np.inf)[None, :]
    places = np.arange(count)
    length = places[None, :] - places[:, None]
    scores[(length < 0) | (length >= LONGEST_ANSWER)] = -np.inf
    first, last = np.unravel_index(int(np.argmax(scores)), scores.shape)
    none = start[0] + end[0]
    if none >= scores[first, last]:
        return float("-inf"), ""
    context = sample["context"].tobytes().decode()
    return float(scores[first, last] - none), context[offsets[first, 0] : offsets[last, 1]]


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and extra spaces, as in SQuAD's script."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", kept).split())


def word_f1(answer: str, true: str) -> float:
    """F1 of the words of an answer, as in SQuAD's script."""
    left, right = normalized(answer).split(), normalized(true).split()
    if not left or not right:
        return float(left == right)
    common = sum((Counter(left) & Counter(right)).values())
    return 2 * common / (len(left) + len(right))
