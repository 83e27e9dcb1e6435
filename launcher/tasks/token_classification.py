"""Token classification: a class for each word (named entities, parts of speech), learnt on its first token."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from numpy.typing import NDArray
from transformers import AutoModelForTokenClassification

from launcher.data.examples import BadExample, EncodingError, Example, Field, Row
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.classification import Labels, class_weights
from launcher.tasks.padding import pad, padding_token
from launcher.tasks.sequence_classification import with_labels

IGNORED = -100
"""Label of a token that is no target, as in transformers."""
Span = tuple[int, int, str]


class TokenClassificationEncoder:
    """Rows with `tokens` (a list of words, or text split at white space) and `tags`, one a word."""

    roles: tuple[str, ...] = ("tokens", "tags")
    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.length = recipe.data.sequence_length
        self.labels = Labels(recipe.classification)
        self.names = list(recipe.classification.labels)
        self.tokenizer: Any = None

    def identity(self) -> Any:
        """The classes."""
        return self.names

    def texts(self, row: Row) -> list[str]:
        """The words."""
        return [" ".join(_words(row["tokens"]))]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Learn the tags."""
        self.tokenizer = tokenizer
        padding_token(tokenizer)
        self.labels.learn(tag for rows in training_rows for row in rows for tag in _words(row["tags"]))

    def fields(self) -> dict[str, Field]:
        """Tokens, and the class of each one that begins a word."""
        return {"input_ids": Field("uint32"), "labels": Field("int64")}

    def encode(self, rows: Sequence[Row]) -> list[Example | BadExample]:
        """Tokenise word by word."""
        return [self._example(row) for row in rows]

    def _example(self, row: Row) -> Example | BadExample:
        words, tags = _words(row["tokens"]), _words(row["tags"])
        if not words:
            return BadExample("it has no words")
        if len(words) != len(tags):
            return BadExample("it has not as many tags as words")
        numbers = [self.labels.encode(tag) for tag in tags]
        # With a space before each word, or a byte-level tokenizer would glue them together.
        encoded = self.tokenizer(
            [word if index == 0 else f" {word}" for index, word in enumerate(words)],
            is_split_into_words=True,
            truncation=True,
            max_length=self.length,
        )
        labels = np.full(len(encoded["input_ids"]), IGNORED, np.int64)
        seen: set[int] = set()
        for position, word in enumerate(encoded.word_ids()):
            if word is not None and word not in seen:
                seen.add(word)
                labels[position] = int(numbers[word])
        return {"input_ids": np.array(encoded["input_ids"], np.uint32), "labels": labels}

    def facts(self) -> dict[str, Any]:
        """Classes and padding."""
        return {**self.labels.facts(), "pad_token_id": padding_token(self.tokenizer)}


def _words(value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, list | tuple):
        raise EncodingError(f"{value!r} is no list of words")
    return [str(word) for word in value]


class TokenClassification(Task):
    """A head on each token: `AutoModelForTokenClassification`."""

    auto_class = AutoModelForTokenClassification
    adapter_task = "TOKEN_CLS"
    has_metrics = True

    def __init__(self, plan: Plan, facts: Mapping[str, Any]) -> None:
        super().__init__(plan, facts)
        self.section = plan.recipe.classification
        self.weights = class_weights(self.section, facts)

    @classmethod
    def encoder(cls, recipe: Recipe) -> TokenClassificationEncoder:
        """Make the encoder of the recipe."""
        if recipe.classification.problem_type != "single_label":
            raise EncodingError("token_classification gives each word one class: problem_type single_label")
        return TokenClassificationEncoder(recipe)

    def config(self) -> Any:
        """Return the model's config with the classes' names."""
        return with_labels(super().config(), "single_label", self.facts)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Pad to the longest sample: `input_ids`, `attention_mask`, `labels`, int64 [samples, length]."""
        batch = pad(samples, "input_ids", self.facts["pad_token_id"])
        batch["labels"] = pad(samples, "labels", IGNORED)["labels"]
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Count the words that have a class."""
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Cross-entropy in nats, summed over words, in fp32."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        labels = batch["labels"]
        loss_sum = F.cross_entropy(
            logits.flatten(0, 1),
            labels.flatten(),
            None if self.weights is None else self.weights.to(logits.device),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.section.label_smoothing,
        )
        predictions = {"classes": logits.detach().argmax(dim=-1), "labels": labels}
        return LossOutput(loss_sum, (labels != IGNORED).sum(), predictions=predictions)

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """Accuracy and F1 of words; and of whole entities where the classes are `B-`, `I-` and `O`."""
        from sklearn import metrics as sk

        names = list(self.facts["labels"])
        rows = [(each["labels"][each["labels"] != IGNORED], each["classes"][each["labels"] != IGNORED])
                for each in predictions]  # fmt: skip
        true, predicted = (np.concatenate(side) for side in zip(*rows, strict=True))
        every = list(range(len(names)))
        values = {
            "accuracy": float(sk.accuracy_score(true, predicted)),
            "f1_macro": float(sk.f1_score(true, predicted, labels=every, average="macro", zero_division=0)),
            "majority_accuracy": float(np.mean(true == int(np.argmax(self.facts["label_counts"])))),
        }
        if all(name == "O" or name[:2] in ("B-", "I-") for name in names):
            counts = [
                _agreement(entities([names[i] for i in left]), entities([names[i] for i in right]))
                for left, right in rows
            ]
            right, found, there = (sum(column) for column in zip(*counts, strict=True))
            precision, recall = right / max(found, 1), right / max(there, 1)
            f1 = 2 * precision * recall / max(precision + recall, 1e-12)
            values |= {"entity_precision": precision, "entity_recall": recall, "entity_f1": f1}
        options: dict[str, Any] = {"labels": every, "target_names": names, "zero_division": 0}
        report = {"classification_report": sk.classification_report(true, predicted, output_dict=True, **options)}
        return Metrics(values, report, str(sk.classification_report(true, predicted, digits=4, **options)))


def entities(tags: Sequence[str]) -> set[Span]:
    """Entities in a row of tags, as (first word, one behind the last, kind).

    As conlleval and seqeval count them: an entity ends before `O`, `B-` or another kind; an `I-` that continues nothing
    begins one.
    """
    found: set[Span] = set()
    start, kind = 0, ""
    for index, tag in enumerate([*tags, "O"]):
        inside = tag.startswith("I-") and tag[2:] == kind
        if kind and not inside:
            found.add((start, index, kind))
            kind = ""
        if tag != "O" and not inside:
            start, kind = index, tag[2:]
    return found


def _agreement(true: set[Span], predicted: set[Span]) -> tuple[int, int, int]:
    return len(true & predicted), len(predicted), len(true)
