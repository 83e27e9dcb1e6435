"""Metrics over 1, 2 and 3 workers are those that the libraries find in one process, of every kind of task."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from scipy import stats
from sklearn import metrics as sk
from torchmetrics.functional.text import rouge_score
from transformers import AutoTokenizer

from launcher.tasks import make_task
from launcher.tasks.question_answering import normalized, word_f1
from tests.support.forked import ForkServer
from tests.support.ranks import Ranks
from tests.training.task_runs import BERT, STDLIB, run_of, write_recipe

pytestmark = [pytest.mark.matrix, pytest.mark.distributed]

T5 = (
    "{model_type: t5, d_model: 32, d_kv: 8, d_ff: 64, num_layers: 2, num_heads: 4, dropout_rate: 0.0, "
    "initializer_factor: 4.0}"
)
LARGE = BERT.replace("}", ", initializer_range: 0.2}")
"""Weights so large that rounding is small beside what the model says."""
VIT = (
    "{model_type: vit, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4, "
    "image_size: 8, patch_size: 4, num_channels: 1}"
)
DOCSTRINGS = r'(?P<source>def \w+\([^)]*\):)\n\s+"""(?P<target>[^"\n]{20,})'


def outputs(task: Any, samples: list[Any]) -> list[Any]:
    """What the model says of each sample alone, by transformers' own forward pass."""
    torch.manual_seed(5)
    model = task.build_model().eval()
    found = []
    for sample in samples:
        batch = task.collate([sample])
        if "pixels" in batch:
            mean, std = (torch.tensor(task.form[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
            batch["pixel_values"] = (batch["pixels"].float() / 255 - mean) / std
        names = {"input_ids", "attention_mask", "token_type_ids", "pixel_values"} & set(batch)
        if task.auto_class.__name__ == "AutoModelForTokenClassification":
            names -= {"token_type_ids"}
        with torch.no_grad():
            found.append(model(**{name: batch[name] for name in names}))
    return found


def of_several_classes(task: Any, samples: list[Any]) -> dict[str, float]:
    logits = torch.cat([output.logits for output in outputs(task, samples)]).numpy()
    labels = np.stack([sample["labels"] for sample in samples])
    return {
        "accuracy": sk.accuracy_score(labels, logits > 0),
        "f1_micro": sk.f1_score(labels, logits > 0, average="micro"),
        "f1_macro": sk.f1_score(labels, logits > 0, average="macro", zero_division=0),
        "roc_auc": sk.roc_auc_score(labels, logits, average="macro"),
    }


def of_numbers(task: Any, samples: list[Any]) -> dict[str, float]:
    predicted = torch.cat([output.logits for output in outputs(task, samples)]).squeeze(-1).numpy()
    labels = np.array([float(sample["labels"]) for sample in samples])
    return {
        "mse": sk.mean_squared_error(labels, predicted),
        "r2": sk.r2_score(labels, predicted),
        "pearson": stats.pearsonr(labels, predicted).statistic,
    }


def of_words(task: Any, samples: list[Any]) -> dict[str, float]:
    found = [output.logits[0].argmax(-1).numpy() for output in outputs(task, samples)]
    counted = [sample["labels"] >= 0 for sample in samples]
    predicted = np.concatenate([classes[there] for classes, there in zip(found, counted, strict=True)])
    labels = np.concatenate([sample["labels"][there] for sample, there in zip(samples, counted, strict=True)])
    return {
        "accuracy": sk.accuracy_score(labels, predicted),
        "f1_macro": sk.f1_score(labels, predicted, average="macro", zero_division=0),
    }


def of_pictures(task: Any, samples: list[Any]) -> dict[str, float]:
    logits = torch.cat([output.logits for output in outputs(task, samples)])
    labels = np.array([int(sample["labels"]) for sample in samples])
    return {
        "accuracy": sk.accuracy_score(labels, logits.argmax(-1)),
        "mcc": sk.matthews_corrcoef(labels, logits.argmax(-1)),
        "roc_auc": sk.roc_auc_score(labels, logits.softmax(-1), multi_class="ovr"),
    }


def of_written_texts(task: Any, samples: list[Any]) -> dict[str, float]:
    torch.manual_seed(5)
    model = task.build_model().eval()
    tokenizer = AutoTokenizer.from_pretrained(task.facts["tokenizer_directory"])
    written = []
    for sample in samples:
        ids = torch.from_numpy(sample["input_ids"].astype(np.int64))[None]
        tokens = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=tokenizer.sep_token_id)
        written.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    assert len(set(written)) > 3
    targets = [bytes(sample["target"]).decode() for sample in samples]
    rouge = rouge_score(written, targets, rouge_keys=("rouge1", "rouge2", "rougeL"))
    return {
        "bleu": BLEU().corpus_score(written, [targets]).score,
        "chrf": CHRF().corpus_score(written, [targets]).score,
        **{name: float(rouge[f"{name}_fmeasure"]) for name in ("rouge1", "rouge2", "rougeL")},
    }


def of_answers(task: Any, samples: list[Any]) -> dict[str, float]:
    """By hand: the best pair of places of each row's windows, read from the context, unless no answer is better."""
    rows: dict[int, list[tuple[float, str]]] = {}
    true: dict[int, list[str]] = {}
    for sample, output in zip(samples, outputs(task, samples), strict=True):
        start, end = output.start_logits[0].double().tolist(), output.end_logits[0].double().tolist()
        offsets, text = sample["offsets"].reshape(-1, 2).tolist(), bytes(sample["context"]).decode()
        inside = [place for place, (begin, _) in enumerate(offsets) if begin >= 0]
        spans = [(start[i] + end[j], i, j) for i in inside for j in inside if i <= j < i + 30]
        score, first, last = max(spans, key=lambda span: (span[0], -span[1], -span[2]))
        none, row = start[0] + end[0], int(sample["row"])
        said = (score - none, text[offsets[first][0] : offsets[last][1]]) if score > none else (-np.inf, "")
        rows.setdefault(row, []).append(said)
        true[row] = bytes(sample["answers"]).decode().split("\x1f")
    answers = [(max(found, key=lambda one: one[0])[1], true[row]) for row, found in rows.items()]
    return {
        "exact_match": float(np.mean([normalized(said) in map(normalized, there) for said, there in answers])),
        "f1": float(np.mean([max(word_f1(said, one) for one in there) for said, there in answers])),
        "rows": float(len(rows)),
    }


Case = tuple[str, str, str | dict[str, Any], dict[str, Any], Callable[[Any, list[Any]], dict[str, float]]]
PICTURES = {"type": "sklearn", "name": "digits"}
FUNCTIONS = {"type": "text", "files": [f"{STDLIB}/email/*.py", f"{STDLIB}/asyncio/*.py"], "pattern": DOCSTRINGS}
WRITTEN = {"seq2seq": {"metrics": ["bleu", "chrf", "rouge"], "max_new_tokens": 12}}
SEVERAL, NUMBERS = ({"classification": {"problem_type": kind}} for kind in ("multi_label", "regression"))
CASES: dict[str, Case] = {
    "written": ("seq2seq_lm", T5, FUNCTIONS, WRITTEN, of_written_texts),
    "words": ("token_classification", LARGE, "tags", {}, of_words),
    "several": ("sequence_classification", LARGE, "statements", SEVERAL, of_several_classes),
    "numbers": ("sequence_classification", LARGE, "lengths", NUMBERS, of_numbers),
    "answers": ("question_answering", LARGE, "questions", {}, of_answers),
    "pictures": ("image_classification", VIT, PICTURES, {"image": {"size": 8}}, of_pictures),
}


@pytest.mark.parametrize("name", CASES)
def test_they_are_the_same_on_any_number_of_workers(
    name: str, tmp_path: Path, assets: Path, one_rank: Ranks, two_ranks: Ranks, fork_server: ForkServer
) -> None:
    kind, model, source, sections, expected_of = CASES[name]
    if isinstance(source, str):
        source = {"type": "jsonl", "files": [f"{assets}/rows/{source}.jsonl"]}
    texts = {} if "pictures" in name else {"tokenizer": {"train": {"vocab_size": 500}}}
    data = {"sequence_length": 1 if "pictures" in name else 64, "validation_fraction": 0.15}
    recipe = write_recipe(
        tmp_path, kind, f"{{config: {model}}}", [source], data=data, evaluation={"max_eval_samples": 37},
        **texts, **sections,
    )  # fmt: skip
    results = []
    for workers in (1, 2, 3):
        directory, plan, prepared = run_of(recipe, tmp_path / f"run{workers}", workers=workers)
        call = {"run_directory": str(directory.path), "data": str(prepared.directory)}
        if workers == 3:
            answers = fork_server.results(3, "task_cases:measure", **call)
        else:
            answers = (one_rank if workers == 1 else two_ranks).call("task_cases:measure", **call)
        assert all(answer["values"] == answers[0]["values"] for answer in answers)
        results.append(answers[0])
    (dataset,) = prepared.split("validation")
    assert len(dataset) > 37
    chosen = [dataset[index * len(dataset) // 37] for index in range(37)]
    expected = expected_of(make_task(plan.model_copy(update={"zero_stage": 0}), prepared.facts), chosen)
    for result in results:
        assert {name: result["values"][name] for name in expected} == pytest.approx(expected, abs=1e-6)
        assert result["values"] == pytest.approx(results[0]["values"], abs=1e-6)
        assert result["report"].keys() == results[0]["report"].keys()
