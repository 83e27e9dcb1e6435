"""What a language model says of labelled texts when it is asked in words, with or without examples to go by."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from pydantic import Field, model_validator

from cluster.strict_yaml import read_yaml
from cluster.validation import near_match, validate
from launcher.data.sampler import evaluation_rows
from launcher.data.store import PreparedData
from launcher.errors import DataError, ExpectedError, RecipeError
from launcher.planning.plan import Plan
from launcher.recipe.section import Section
from launcher.recipe.task_sections import ClassificationSection
from launcher.recipe.tasks import TASKS
from launcher.tasks.classification import classification_metrics
from launcher.training.offline import load_checkpoint, whole_model
from launcher.training.prediction import read_table


class PromptSection(Section):
    """A labelled set, and how the model is asked about it."""

    file: str
    """JSON lines, CSV or Parquet; a relative path is taken from the folder of this file."""
    template: str
    """The question, with columns of the file in braces: `"{text}\\nIs this good or bad? It is"`."""
    label: str = "label"
    """The column that holds the label."""
    verbalizers: dict[str, str] = Field(min_length=2)
    """How the model says each label: `{pos: " good", neg: " bad"}`. The likeliest of them is its answer."""
    shots: int = Field(default=0, ge=0)
    """So many rows come before each question, with their answers; they are not asked about."""
    separator: str = "\n\n"
    """Stands between them."""
    seed: int = 0
    """Of which rows these are."""

    @model_validator(mode="after")
    def _answers_differ(self) -> "PromptSection":
        if len(set(self.verbalizers.values())) < len(self.verbalizers) or not all(self.verbalizers.values()):
            raise ValueError("verbalizers must differ, and none may be empty")
        return self


@dataclass(frozen=True)
class Asked:
    """What was found.

    Attributes:
        examples: rows that were asked about.
        before: metrics by name of the model that training began with, and `loss`: minus the log-probability of the
            right answer among the answers, in nats.
        after: the same of the checkpoint.
    """

    examples: int
    before: Mapping[str, float]
    after: Mapping[str, float]


def read_prompts(path: Path) -> PromptSection:
    """Read a file that says what to ask.

    Raises:
        RecipeError: it is wrong; lists every problem with its line.
    """
    section = validate(PromptSection, read_yaml(path, RecipeError), RecipeError)
    return section.model_copy(update={"file": str(path.absolute().parent / section.file)})


def ask(
    folder: Path, plan: Plan, prepared: PreparedData, section: PromptSection, max_samples: int | None = None
) -> Asked:
    """Ask the model that training began with, and a checkpoint, about the same rows in this process.

    Args:
        folder: of the checkpoint.
        plan: of its run.
        prepared: its data.
        section: what to ask.
        max_samples: ask at most so many questions, spread evenly over all of them.

    Raises:
        ExpectedError: the task's model writes no text.
        DataError: the file has other columns or labels, or a question is longer than the model allows.
    """
    if not TASKS[plan.recipe.task].generates:
        raise ExpectedError(f"the model of task {plan.recipe.task} writes no text, so it cannot be asked")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_directory)
    questions, labels = make_questions(read_table(Path(section.file)), section)
    chosen = evaluation_rows([len(questions)], max_samples)[1].tolist()
    questions, labels = [questions[row] for row in chosen], [labels[row] for row in chosen]
    longest = plan.model.max_position_embeddings if plan.model else None
    _, _, first = whole_model(plan, prepared)
    before = _measured(first, tokenizer, questions, labels, section, longest)
    _, _, last = load_checkpoint(folder, plan, prepared)
    return Asked(len(questions), before, _measured(last, tokenizer, questions, labels, section, longest))


def make_questions(rows: Sequence[Mapping[str, Any]], section: PromptSection) -> tuple[list[str], list[str]]:
    """Prompts and the right labels.

    Raises:
        DataError: the rows have other columns or labels, or are too few.
    """
    if len(rows) <= section.shots:
        raise DataError(f"{section.file} has {len(rows)} rows, of which {section.shots} are shots: none is left to ask")
    if section.label not in rows[0]:
        raise DataError(f"{section.file} has no column {section.label}; it has {', '.join(rows[0])}")
    names = list(section.verbalizers)
    for row in rows:
        if str(row[section.label]) not in names:
            raise DataError(
                f"the label {str(row[section.label])!r} in {section.file} has no verbalizer; "
                f"{near_match(str(row[section.label]), names)}"
            )
    try:
        written = [section.template.format(**row) for row in rows]
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(
            f"the template does not fit {section.file}: {error!r}; its columns are {', '.join(rows[0])}"
        ) from error
    shown = random.Random(section.seed).sample(range(len(rows)), section.shots)  # noqa: S311 (no secret)
    labels = [str(row[section.label]) for row in rows]
    shots = [written[index] + section.verbalizers[labels[index]] for index in shown]
    asked = [index for index in range(len(rows)) if index not in set(shown)]
    return [section.separator.join([*shots, written[index]]) for index in asked], [labels[index] for index in asked]


def _measured(
    model: Any, tokenizer: Any, questions: Sequence[str], labels: Sequence[str], section: PromptSection, longest: Any
) -> dict[str, float]:
    names = list(section.verbalizers)
    counts = [labels.count(name) for name in names]
    predictions = [
        {
            "logits": np.array(answer_scores(model, tokenizer, question, list(section.verbalizers.values()), longest)),
            "labels": np.array(names.index(label)),
        }
        for question, label in zip(questions, labels, strict=True)
    ]
    logits = torch.from_numpy(np.stack([each["logits"] for each in predictions]))
    right = torch.from_numpy(np.stack([each["labels"] for each in predictions]))
    facts = {"labels": names, "label_counts": counts}
    found = classification_metrics(predictions, ClassificationSection(), facts).values
    return {"loss": float(F.cross_entropy(logits, right)), **found}


@torch.no_grad()
def answer_scores(
    model: Any, tokenizer: Any, question: str, answers: Sequence[str], longest: int | None = None
) -> list[float]:
    """Log-probability of each answer after a question, in nats, summed over its tokens.

    Raises:
        DataError: the question is empty, or with its answer longer than `longest` tokens.
    """
    scores = []
    asked = tokenizer(question, return_token_type_ids=False)["input_ids"]
    asked = _without_end(asked, tokenizer)
    if not asked:
        raise DataError("a question has no tokens; write something into the template before the answer")
    for answer in answers:
        own = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([asked + own])
        if longest is not None and ids.shape[1] > longest:
            raise DataError(
                f"a question has {ids.shape[1]} tokens, but the model reads {longest}; ask with fewer shots"
            )
        logits = model(input_ids=ids).logits[0, -ids.shape[1] :]  # a prompt that an adapter learned stands before them
        log_probabilities = F.log_softmax(logits.float(), dim=-1)
        places = range(len(asked) - 1, ids.shape[1] - 1)
        scores.append(sum(float(log_probabilities[place, token]) for place, token in zip(places, own, strict=True)))
    return scores


def _without_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Some tokenizers end each text; an answer must follow instead."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
