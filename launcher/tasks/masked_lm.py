"""Masked language modelling (BERT): predict hidden tokens, and perhaps whether one text follows another."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from numpy.typing import NDArray
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining
from xxhash import xxh3_64_intdigest

from launcher.data.examples import BadExample, EncodingError, Example, Field, Row
from launcher.data.loader import EPOCH
from launcher.planning.plan import Plan
from launcher.recipe.schema import Recipe
from launcher.recipe.task_sections import MaskedLanguageModellingSection
from launcher.tasks.base import Batch, LossOutput, Metrics, Sample, Task
from launcher.tasks.padding import mask_token, pad, padding_token
from launcher.tasks.sequence_classification import reads_token_types

IGNORED = -100
"""Label of a position that is no target, as in transformers."""
NO_WORD = np.iinfo(np.uint16).max
"""Word of a special token, which is never hidden."""
FOLLOWS, RANDOM = 0, 1
"""Next-sentence labels, as in transformers' BERT."""


class MaskedLanguageModellingEncoder:
    """Rows with `text`, cut into samples of `sequence_length` tokens, or of two halves each."""

    roles: tuple[str, ...] = ("text",)
    optional_roles: tuple[str, ...] = ()

    def __init__(self, recipe: Recipe) -> None:
        self.length = recipe.data.sequence_length
        self.pairs = recipe.masked_lm.next_sentence
        self.seed = recipe.seed
        self.tokenizer: Any = None

    def identity(self) -> Any:
        """Whether samples are pairs; which of them follow depends on the seed."""
        return ["pairs", self.seed] if self.pairs else []

    def texts(self, row: Row) -> list[str]:
        """The text."""
        return [str(row["text"] or "")]

    def begin(self, tokenizer: Any, training_rows: Iterable[Sequence[Row]]) -> None:
        """Check the special tokens."""
        self.tokenizer = tokenizer
        mask_token(tokenizer)
        padding_token(tokenizer)
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
            raise EncodingError("the tokenizer has no begin (cls) or separator (sep) token", "tokenizer")

    def fields(self) -> dict[str, Field]:
        """Tokens, the word that each is of, and for pairs which text each is of and whether the second follows."""
        fields = {"input_ids": Field("uint32"), "words": Field("uint16"), "sample_labels": Field("int64", ())}
        if self.pairs:
            fields |= {"token_type_ids": Field("uint8"), "next_sentence_labels": Field("int64", ())}
        return fields

    def encode(self, rows: Sequence[Row]) -> Sequence[Example | list[Example] | BadExample]:
        """Tokenise and cut; second halves that do not follow come from another row."""
        encoded = self.tokenizer(
            [str(row["text"] or "") for row in rows], add_special_tokens=False, return_attention_mask=False
        )
        room = self.length - (3 if self.pairs else 2)
        chunks: list[list[Any]] = []
        for index in range(len(rows)):
            ids = np.array(encoded["input_ids"][index], np.uint32)
            words = np.array([NO_WORD if w is None else w % NO_WORD for w in encoded.word_ids(index)], np.uint16)
            chunks.append([(ids[i : i + room], words[i : i + room]) for i in range(0, len(ids), room)])
        if not self.pairs:
            return [
                [self._framed([part]) for part in parts] if parts else BadExample("its text is empty")
                for parts in chunks
            ]
        return self._pairs(chunks)

    def _pairs(self, chunks: list[list[Any]]) -> list[Example | list[Example] | BadExample]:
        made: list[Example | list[Example] | BadExample] = []
        for index, parts in enumerate(chunks):
            examples = []
            for ids, words in parts:
                if len(ids) < 4:
                    continue
                digest = xxh3_64_intdigest(ids.tobytes(), seed=self.seed)
                half = len(ids) // 2
                first, second, label = (ids[:half], words[:half]), (ids[half:], words[half:]), FOLLOWS
                other = _elsewhere(chunks, index, digest >> 1) if digest % 2 else None
                if other is not None:
                    # As long as the true one, so that the length says nothing.
                    second, label = (other[0][-len(second[0]) :], other[1][-len(second[1]) :]), RANDOM
                examples.append(self._framed([first, second], label))
            made.append(examples if examples else BadExample("its text is too short for two parts"))
        return made

    def _framed(self, parts: list[Any], label: int | None = None) -> Example:
        ids, words, types = [self.tokenizer.cls_token_id], [NO_WORD], [0]
        for number, (part_ids, part_words) in enumerate(parts):
            shift = number * (NO_WORD // 2)  # words of the two texts are different ones
            ids += [*part_ids.tolist(), self.tokenizer.sep_token_id]
            words += [*((int(w) + shift) % NO_WORD if w != NO_WORD else NO_WORD for w in part_words), NO_WORD]
            types += [number] * (len(part_ids) + 1)
        example: Example = {
            "input_ids": np.array(ids, np.uint32),
            "words": np.array(words, np.uint16),
            "sample_labels": np.array(0, np.int64),  # ignored in a sample that only fills up a batch
        }
        if label is not None:
            example |= {"token_type_ids": np.array(types, np.uint8), "next_sentence_labels": np.array(label, np.int64)}
        return example

    def facts(self) -> dict[str, Any]:
        """Ids of the special tokens, and how many tokens there are."""
        return {
            "pad_token_id": padding_token(self.tokenizer),
            "mask_token_id": mask_token(self.tokenizer),
            "vocab_size": len(self.tokenizer),
            "special_ids": sorted(self.tokenizer.all_special_ids),
        }


def _elsewhere(chunks: list[list[Any]], index: int, number: int) -> Any:
    """Some chunk of another row, chosen by a number; `None` where there is no other."""
    others = [other for other in range(len(chunks)) if other != index and chunks[other]]
    if not others:
        return None
    parts = chunks[others[number % len(others)]]
    return parts[number % len(parts)]


def hide(
    example: Sample, section: MaskedLanguageModellingSection, facts: Mapping[str, Any], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose the tokens to predict and replace most of them.

    The choice is a function of (seed, epoch, content): the same for any number of ranks and after a resume, another one
    in each epoch.

    Args:
        example: `input_ids`, `words`, and the epoch of a training sample.
        section: shares.
        facts: the encoder's.
        seed: of the recipe.

    Returns:
        Tokens after hiding, and labels: the true token at each position to predict, -100 elsewhere.
    """
    ids, words = example["input_ids"].astype(np.int64), example["words"]
    labels = np.full_like(ids, IGNORED)
    random = np.random.default_rng([seed, int(example.get(EPOCH, 0)), xxh3_64_intdigest(ids.tobytes())])
    candidates = np.flatnonzero(words != NO_WORD)
    wanted = max(1, round(len(candidates) * section.mask_probability))
    if not section.whole_word:
        chosen = random.permutation(candidates)[:wanted]
    else:
        picked: list[NDArray[np.int64]] = []
        for word in random.permutation(np.unique(words[candidates])):
            if sum(map(len, picked)) >= wanted:
                break
            picked.append(np.flatnonzero(words == word))
        chosen = np.concatenate([*picked, np.empty(0, np.int64)]).astype(np.int64)
    labels[chosen] = ids[chosen]
    lot = random.random(len(chosen))
    ids[chosen[lot < section.replace_by_mask]] = facts["mask_token_id"]
    by_random = chosen[(lot >= section.replace_by_mask) & (lot < section.replace_by_mask + section.replace_by_random)]
    plain = np.setdiff1d(np.arange(facts["vocab_size"]), facts["special_ids"])
    ids[by_random] = random.choice(plain, len(by_random))
    return ids, labels


class MaskedLanguageModelling(Task):
    """`AutoModelForMaskedLM`, or with next-sentence prediction `AutoModelForPreTraining` (a BERT's two heads)."""

    auto_class = AutoModelForMaskedLM
    has_metrics = True

    def __init__(self, plan: Plan, facts: Mapping[str, Any]) -> None:
        super().__init__(plan, facts)
        self.section = plan.recipe.masked_lm
        if self.section.next_sentence:
            self.auto_class = AutoModelForPreTraining  # type: ignore[misc]  # a class of a library without types

    @classmethod
    def encoder(cls, recipe: Recipe) -> MaskedLanguageModellingEncoder:
        """Make the encoder of the recipe."""
        return MaskedLanguageModellingEncoder(recipe)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Hide tokens and pad: `input_ids`, `attention_mask`, `labels`, [samples, length], and those of the pairs."""
        hidden = [hide(sample, self.section, self.facts, self.plan.recipe.seed) for sample in samples]
        ignored = [int(sample["sample_labels"]) == IGNORED for sample in samples]
        batch = pad([{"input_ids": ids} for ids, _ in hidden], "input_ids", self.facts["pad_token_id"])
        batch["labels"] = pad([{"labels": labels} for _, labels in hidden], "labels", IGNORED)["labels"]
        batch["labels"][torch.tensor(ignored)] = IGNORED  # samples that only fill up the batch
        if self.section.next_sentence:
            batch["token_type_ids"] = pad(samples, "token_type_ids", 0)["token_type_ids"]
            batch["next_sentence_labels"] = torch.tensor([int(sample["next_sentence_labels"]) for sample in samples])
        return batch

    def num_targets(self, batch: Batch) -> int:
        """Count the tokens to predict."""
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        """Cross-entropy in nats of the hidden tokens, summed, in fp32.

        With next-sentence prediction, its mean over the samples of this micro batch is added to the mean over hidden
        tokens, as in transformers' `BertForPreTraining`; so its sum is multiplied by hidden tokens a sample.
        """
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if self.section.next_sentence and reads_token_types(model):
            inputs["token_type_ids"] = batch["token_type_ids"]
        output = model(**inputs)
        logits = output.prediction_logits if self.section.next_sentence else output.logits
        each = F.cross_entropy(
            logits.float().flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="none"
        ).view_as(batch["labels"])
        counted = batch["labels"] != IGNORED
        loss_sum = each.sum()
        predictions = {
            "loss": each.detach().sum(dim=1),
            "tokens": counted.sum(dim=1),
            "right": ((logits.detach().argmax(dim=-1) == batch["labels"]) & counted).sum(dim=1),
        }
        if self.section.next_sentence:
            targets, relation = batch["next_sentence_labels"], output.seq_relationship_logits.float()
            pair_sum = F.cross_entropy(relation, targets, ignore_index=IGNORED, reduction="sum")
            loss_sum = loss_sum + pair_sum * counted.sum() / (targets != IGNORED).sum().clamp(min=1)
            predictions |= {
                "pair_loss": F.cross_entropy(relation.detach(), targets, ignore_index=IGNORED, reduction="none"),
                "pair_right": relation.detach().argmax(dim=-1) == targets,
                "pair_labels": targets,
            }
        return LossOutput(loss_sum, counted.sum(), predictions=predictions)

    def metrics(self, predictions: list[dict[str, NDArray[Any]]], samples: Sequence[Sample]) -> Metrics:
        """Loss and accuracy of the hidden tokens, and of the pairs."""
        sums = {name: float(sum(float(each[name]) for each in predictions)) for name in predictions[0]}
        tokens = max(sums["tokens"], 1.0)
        values = {"masked_lm_loss": sums["loss"] / tokens, "masked_lm_accuracy": sums["right"] / tokens}
        if self.section.next_sentence:
            values |= {
                "next_sentence_loss": sums["pair_loss"] / len(predictions),
                "next_sentence_accuracy": sums["pair_right"] / len(predictions),
                "next_sentence_majority_accuracy": max(share := sums["pair_labels"] / len(predictions), 1 - share),
            }
        return Metrics(values)
