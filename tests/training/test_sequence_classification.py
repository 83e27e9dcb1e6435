"""Sequence classification: its loss is transformers', its metrics are scikit-learn's over each sample once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import metrics as sk

from launcher.checkpoints import folders
from launcher.data.loader import without_targets
from launcher.errors import PlanError, SourceError
from launcher.run_directory import read_json_lines
from launcher.tasks import make_task
from launcher.training.export import export_checkpoint
from tests.support.forked import ForkServer
from tests.support.ranks import Ranks
from tests.training.task_runs import BERT, STDLIB, run_of, write_recipe

TOKENIZER = {"train": {"vocab_size": 400}}


def paragraphs(*packages: str) -> list[tuple[str, str]]:
    found = []
    for package in packages:
        for path in sorted(Path(STDLIB, package).glob("*.py")):
            found += [(part.strip(), package) for part in path.read_text().split("\n\n") if len(part.strip()) > 40]
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Paragraphs of two packages as JSON lines, with a label, several labels, a number or a second text each."""
    folder = tmp_path_factory.mktemp("rows")
    texts = paragraphs("json", "email")[:301]
    words = ("return", "self", "import", "class")
    rows: dict[str, list[dict[str, Any]]] = {
        "single": [{"text": text, "label": package} for text, package in texts],
        "multi": [{"text": text, "label": [word for word in words if word in text]} for text, _ in texts],
        "number": [{"text": text, "label": text.count("\n") / 10} for text, _ in texts],
        "pairs": [
            {"text": a, "text_pair": b, "label": int(first == second)}
            for (a, first), (b, second) in zip(texts, texts[1:] + texts[:1], strict=True)
        ],
    }
    rows["pairs"] += [{**row, "text_pair": texts[-1 - i][0], "label": 0} for i, row in enumerate(rows["pairs"][:100])]
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return {name: folder / f"{name}.jsonl" for name in rows}


def make(folder: Path, file: Path, *overrides: str, workers: int = 2, model: str = BERT, **sections: Any) -> Any:
    recipe = write_recipe(
        folder,
        "sequence_classification",
        f"{{config: {model}}}",
        [{"type": "jsonl", "files": [str(file)]}],
        tokenizer=TOKENIZER,
        data={
            **BASE_DATA,
            "sources": [{"type": "jsonl", "files": [str(file)]}],
            "cache_directory": str(file.parent / "cache"),
        },
        **sections,
    )
    return run_of(recipe, folder / f"run{workers}", *overrides, workers=workers)


BASE_DATA = {"validation_fraction": 0.2, "sequence_length": 48, "preprocessing_num_workers": 1}


def batch_of(prepared: Any, task: Any, count: int = 7) -> dict[str, torch.Tensor]:
    (dataset,) = prepared.split("train")
    samples = [dataset[index] for index in range(count)]
    return task.collate([*samples, without_targets(samples[0])])


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "problem_type"),
    [("single", "single_label"), ("multi", "multi_label"), ("number", "regression"), ("pairs", "single_label")],
)
def test_the_loss_is_that_of_transformers(sources, tmp_path, kind, problem_type) -> None:
    _, plan, prepared = make(tmp_path, sources[kind], classification={"problem_type": problem_type})
    task = make_task(plan, prepared.facts)
    model = task.build_model().eval()
    batch = batch_of(prepared, task)
    output = task.loss(model, batch)
    assert int(output.num_targets) == task.num_targets(batch) == 7
    expected = model(**{name: values[:7] for name, values in batch.items()}).loss
    assert float(output.loss_sum / output.num_targets) == pytest.approx(float(expected), abs=1e-5)
    if kind == "pairs":
        assert set(batch["token_type_ids"][0].tolist()) == {0, 1}


def test_class_weights_and_label_smoothing_are_those_of_pytorch(sources, tmp_path) -> None:
    section = {"class_weights": "balanced", "label_smoothing": 0.1}
    _, plan, prepared = make(tmp_path, sources["single"], classification=section)
    task = make_task(plan, prepared.facts)
    assert prepared.facts["labels"] == ["email", "json"]
    counts = np.array(prepared.facts["label_counts"], float)
    assert task.weights.numpy() == pytest.approx(counts.sum() / 2 / counts), "scikit-learn's `balanced`"
    model = task.build_model().eval()
    batch = batch_of(prepared, task)
    logits = model(**{name: values[:7] for name, values in batch.items() if name != "labels"}).logits
    expected = F.cross_entropy(logits, batch["labels"][:7], task.weights, reduction="sum", label_smoothing=0.1)
    assert float(task.loss(model, batch).loss_sum) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.distributed
def test_metrics_are_those_of_scikit_learn_whatever_the_number_of_workers(
    sources, tmp_path, one_rank: Ranks, two_ranks: Ranks, fork_server: ForkServer
) -> None:
    results = []
    for workers, call in ((1, one_rank.call), (2, two_ranks.call), (3, fork_server.results)):
        directory, plan, prepared = make(tmp_path, sources["single"], workers=workers)
        arguments = {"run_directory": str(directory.path), "data": str(prepared.directory)}
        if workers == 3:
            answers = fork_server.results(3, "task_cases:measure", **arguments)
        else:
            answers = call("task_cases:measure", **arguments)
        assert all(answer["values"] == answers[0]["values"] for answer in answers)
        results.append(answers[0])
    (dataset,) = prepared.split("validation")
    assert all(len(dataset) % size for size in (2, 3, 4)), "no multiple of anything"
    task = make_task(plan, prepared.facts)
    torch.manual_seed(plan.recipe.seed)
    model = task.build_model().eval()
    with torch.no_grad():
        batches = [task.collate([dataset[index]]) for index in range(len(dataset))]
        logits = torch.cat([model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in batches])
    labels = np.array([int(dataset[index]["labels"]) for index in range(len(dataset))])
    predicted = logits.argmax(-1).numpy()
    expected = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "mcc": sk.matthews_corrcoef(labels, predicted),
        "f1_macro": sk.f1_score(labels, predicted, average="macro"),
        "precision_macro": sk.precision_score(labels, predicted, average="macro", zero_division=0),
        "roc_auc": sk.roc_auc_score(labels, logits.softmax(-1)[:, 1].numpy()),
        "pr_auc": sk.average_precision_score(labels, logits.softmax(-1)[:, 1].numpy()),
    }
    for result in results:
        assert result["targets"] == len(dataset)
        assert {name: result["values"][name] for name in expected} == pytest.approx(expected, abs=1e-9)
        matrix = result["report"]["confusion_matrix"]
        assert matrix == {"labels": ["email", "json"], "rows": sk.confusion_matrix(labels, predicted).tolist()}
        assert result["report"] == results[0]["report"]


@pytest.mark.distributed
@pytest.mark.matrix
@pytest.mark.parametrize("stage", [2, 3])
def test_it_learns_and_exports(sources, tmp_path, two_ranks: Ranks, stage: int) -> None:
    directory, plan, prepared = make(
        tmp_path, sources["single"], f"zero.stage={stage}", "training.max_steps=40", "training.micro_batch_size=8",
        "evaluation.eval_steps=20",
    )  # fmt: skip
    results = two_ranks.call("cases:run", run_directory=str(directory.path), data=str(prepared.directory))
    metrics = results[0]["metrics"]
    assert metrics["eval_accuracy"] > metrics["eval_majority_accuracy"] + 0.05
    evaluation = json.loads((directory.path / "evaluation.json").read_text())
    assert evaluation["metrics"]["accuracy"] == metrics["eval_accuracy"]
    assert "macro avg" in evaluation["report"]["classification_report"]
    assert [r["step"] for r in read_json_lines(directory.metrics) if "eval_accuracy" in r] == [20, 40]
    newest = folders.complete(directory.checkpoints)[-1]
    export_checkpoint(newest, plan, prepared.tokenizer_directory, directory.export)
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    model = AutoModelForSequenceClassification.from_pretrained(directory.export)
    assert model.config.id2label == {0: "email", 1: "json"}
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(directory.export))
    assert classify("json.dumps(obj)")[0]["label"] in ("email", "json")


BAD: list[tuple[str, list[dict[str, Any]], dict[str, Any], str]] = [
    ("one class", [{"text": "a b", "label": 1}] * 9, {}, "must hold examples of 2 classes at least, but has: '1'"),
    (
        "wrong columns",
        [{"review": "a b", "stars": 1}],
        {},
        "there is no column text for the task's text; the columns are review, stars; "
        "name the one that holds it: columns: {text: NAME}",
    ),
    (
        "unknown label",
        [{"text": f"text {i}", "label": ["good", "bad", "goood"][i % 3]} for i in range(9)],
        {"classification": {"labels": ["good", "bad"]}},
        "the label 'goood' is none of the classes good, bad; did you mean good?",
    ),
    (
        "empty texts",
        [{"text": "" if i % 2 else f"text {i}", "label": i % 3} for i in range(40)],
        {},
        "20 of 40 examples cannot be used: 20 x its text is empty",
    ),
    (
        "no number",
        [{"text": f"text {i}", "label": "many"} for i in range(9)],
        {"classification": {"problem_type": "regression"}},
        "the label 'many' is no number",
    ),
    (
        "several labels",
        [{"text": f"text {i}", "label": ["a", "b"]} for i in range(9)],
        {},
        "set problem_type: multi_label",
    ),
    (
        "balanced weight of nothing",
        [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(9)],
        {"classification": {"labels": ["a", "b", "c"], "class_weights": "balanced"}},
        "no training example is of class c",
    ),
]


@pytest.mark.parametrize(("rows", "sections", "expected"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_rows(tmp_path, rows, sections, expected) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SourceError) as caught:
        make(tmp_path, file, **sections)
    assert expected in str(caught.value)


def test_a_few_bad_rows_are_left_out_and_counted(tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(200)] + [{"text": "  ", "label": 0}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, _, prepared = make(tmp_path, file)
    assert prepared.statistics["sources"][0]["bad_examples"] == 1
    assert prepared.statistics["notes"] == [
        "data.sources.0: 1 of 201 examples cannot be used: 1 x its text is empty; they were left out"
    ]
    assert sum(len(part) for name in ("train", "validation") for part in prepared.split(name)) == 200


def test_texts_longer_than_the_models_positions_are_refused(sources, tmp_path) -> None:
    with pytest.raises(PlanError, match="999 is longer than the model's 128 positions; set it to at most 128"):
        make(tmp_path, sources["single"], "data.sequence_length=999")
