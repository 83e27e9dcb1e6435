"""Token classification, question answering and sequence to sequence: transformers' losses, and known metrics."""

import ast
import io
import json
import keyword
import tokenize
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launcher.data.loader import without_targets
from launcher.errors import SourceError
from launcher.run_directory import RunDirectory, read_json_lines
from launcher.tasks import make_task
from launcher.tasks.question_answering import normalized, word_f1
from launcher.tasks.token_classification import entities
from tests.support.ranks import Ranks
from tests.training.task_runs import BERT, STDLIB, run_of, write_recipe

T5 = (
    "{model_type: t5, d_model: 32, d_kv: 8, d_ff: 64, num_layers: 2, num_heads: 4, dropout_rate: 0.0, "
    "decoder_start_token_id: 0}"
)


def sources() -> list[str]:
    return [
        path.read_text() for name in ("json", "email", "asyncio") for path in sorted(Path(STDLIB, name).glob("*.py"))
    ]


def python_words() -> list[dict[str, Any]]:
    """Lines of Python with the kind of each token: keyword, name, number, string or operator."""
    rows, words, tags = [], [], []
    for token in (token for text in sources() for token in tokenize.generate_tokens(io.StringIO(text).readline)):
        if token.type == tokenize.NEWLINE:
            if len(words) > 3:
                rows.append({"tokens": words, "tags": tags})
            words, tags = [], []
        kinds = {tokenize.NAME: "name", tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.OP: "op"}
        if token.type in kinds and len(token.string) < 40:
            words.append(token.string)
            tags.append("keyword" if keyword.iskeyword(token.string) else kinds[token.type])
    return rows


def functions() -> list[dict[str, Any]]:
    """Function heads and docstrings of the library."""
    found = []
    for text in sources():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)):
                found.append({"name": node.name, "head": (ast.get_source_segment(text, node) or "")[:300], "doc": doc})
    return found


def questions() -> list[dict[str, Any]]:
    rows = []
    for function in functions():
        context = function["head"][:70]  # one window, as a rule
        answers = {"text": [function["name"]], "answer_start": [context.index(function["name"])]}
        rows.append({"question": "Which?", "context": context, "answers": answers})
    return rows


def pairs() -> list[dict[str, Any]]:
    return [{"source": function["head"], "target": function["doc"].splitlines()[0]} for function in functions()]


ROWS = {"token_classification": python_words, "question_answering": questions, "seq2seq_lm": pairs}


def make(folder: Path, task: str, *overrides: str, rows: list[dict[str, Any]] | None = None) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[task]() if rows is None else rows)))
    recipe = write_recipe(
        folder,
        task,
        f"{{config: {T5 if task == 'seq2seq_lm' else BERT}}}",
        [{"type": "jsonl", "files": [str(file)]}],
        data={"sequence_length": 48},
        tokenizer={"train": {"vocab_size": 500}},
    )
    return run_of(recipe, folder / "run", *overrides)


def expected_loss(task: str, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if task == "question_answering" else [])]
    inputs = {name: batch[name] for name in names}
    if task == "question_answering":
        labels = batch["labels"]
        return model(**inputs, start_positions=labels[:, 0], end_positions=labels[:, 1]).loss
    return model(**inputs, labels=batch["labels"]).loss


@pytest.mark.parametrize("name", list(ROWS))
def test_the_loss_is_that_of_transformers(tmp_path: Path, name: str) -> None:
    _, plan, prepared = make(tmp_path, name)
    task = make_task(plan, prepared.facts)
    model = task.build_model().eval()
    (dataset,) = prepared.split("train")
    samples = [dataset[index] for index in range(6)]
    batch = task.collate(samples)
    output = task.loss(model, batch)
    assert int(output.num_targets) == task.num_targets(batch) > 0
    mean = (output.loss_sum / output.num_targets).item()
    assert mean == pytest.approx(expected_loss(name, model, batch).item(), abs=1e-5)
    filled = task.collate([*samples, without_targets(samples[0])])
    again = task.loss(model, filled)
    assert task.num_targets(filled) == task.num_targets(batch)
    assert again.loss_sum.item() == pytest.approx(output.loss_sum.item(), abs=1e-4)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "steps"), [("token_classification", 60), ("question_answering", 100), ("seq2seq_lm", 60)]
)
def test_two_workers_learn_it(tmp_path: Path, two_ranks: Ranks, name: str, steps: int) -> None:
    directory, _, prepared = make(
        tmp_path, name, f"training.max_steps={steps}", "training.micro_batch_size=16", "evaluation.eval_steps=1",
        "evaluation.max_eval_samples=101", "training.learning_rate=6.0e-3", "logging.logging_steps=20",
    )  # fmt: skip
    two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    records = evaluations(directory)
    if name == "token_classification":
        assert records[-1]["eval_accuracy"] > records[-1]["eval_majority_accuracy"] + 0.1
    elif name == "question_answering":
        assert records[-1]["eval_exact_match"] > records[0]["eval_exact_match"] + 0.1
    else:
        assert records[-1]["eval_loss"] < records[0]["eval_loss"] - 0.5


def evaluations(directory: RunDirectory) -> list[dict[str, Any]]:
    return [record for record in read_json_lines(directory.metrics) if "eval_loss" in record]


def test_tags_stand_on_the_first_token_of_each_word(tmp_path: Path) -> None:
    rows = [{"tokens": ["for", "unheardofname", "in", "x"], "tags": ["k", "n", "k", "n"]}] * 5 + python_words()[:50]
    rows[5:] = [{**row, "tags": ["k" if tag == "keyword" else "n" for tag in row["tags"]]} for row in rows[5:]]
    _, _, prepared = make(tmp_path, "token_classification", rows=rows)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(prepared.tokenizer_directory)
    first = next(
        part[i] for split in ("train", "validation") for part in prepared.split(split) for i in range(len(part))
        if "unheardofname" in tokenizer.decode(part[i]["input_ids"].astype(int))
    )  # fmt: skip
    marked = [
        tokenizer.decode([int(i)]) for i, label in zip(first["input_ids"], first["labels"], strict=True) if label >= 0
    ]
    assert len(marked) == 4
    assert (marked[0], marked[2], marked[3]) == ("for", " in", " x")
    assert [prepared.facts["labels"][label] for label in first["labels"] if label >= 0] == ["k", "n", "k", "n"]


def test_entities_are_counted_as_conlleval_does() -> None:
    tags = ["B-PER", "I-PER", "O", "I-ORG", "I-ORG", "B-ORG", "I-PER", "O", "B-LOC"]
    assert entities(tags) == {(0, 2, "PER"), (3, 5, "ORG"), (5, 6, "ORG"), (6, 7, "PER"), (8, 9, "LOC")}
    assert entities(["O", "O"]) == set()


def test_answers_are_compared_as_squad_does() -> None:
    assert normalized("The  Cat, an animal!") == "cat animal"
    assert word_f1("the black cat", "a cat") == pytest.approx(2 / 3)
    assert word_f1("", "") == 1.0
    assert word_f1("dog", "") == 0.0


def test_answers_are_found_in_the_windows_of_a_long_context(tmp_path: Path) -> None:
    context = " ".join(f"word{i}" for i in range(200))
    start = context.index("word150")
    row = {"question": "Which?", "context": context, "answers": {"text": ["word150"], "answer_start": [start]}}
    others = [{**row, "question": f"Which one is {i}?"} for i in range(9)]
    _, plan, prepared = make(tmp_path, "question_answering", rows=[row, *others])
    task = make_task(plan, prepared.facts)
    samples = [part[i] for part in prepared.split("train") for i in range(len(part))]
    hit = [sample for sample in samples if sample["labels"][0] > 0]
    assert 0 < len(hit) < len(samples)
    perfect = []
    for sample in samples:
        scores = {name: np.zeros(len(sample["input_ids"])) for name in ("start", "end")}
        scores["start"][sample["labels"][0]] = scores["end"][sample["labels"][1]] = 5
        perfect.append({**scores, "inside": sample["offsets"].reshape(-1, 2)[:, 0] >= 0})
    metrics = task.metrics(perfect, samples).values
    assert (metrics["exact_match"], metrics["f1"]) == (1.0, 1.0)
    assert metrics["rows"] == len({int(sample["row"]) for sample in samples})


@pytest.mark.parametrize(
    ("name", "row", "reason"),
    [
        ("token_classification", {"tokens": ["a", "b"], "tags": ["x"]}, "it has not as many tags as words"),
        (
            "question_answering",
            {"question": "q", "context": "some words", "answers": {"text": ["words"], "answer_start": [9]}},
            "its answer does not stand where answer_start says",
        ),
        ("seq2seq_lm", {"source": "", "target": "x"}, "its source or its target is empty"),
    ],
)
def test_bad_rows_are_counted(tmp_path: Path, name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(SourceError, match=f"2 of 32 examples cannot be used: 2 x {reason}"):
        make(tmp_path, name, rows=[*ROWS[name]()[:30], row, row])
