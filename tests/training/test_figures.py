"""Curves and samples of an evaluation, as TensorBoard shows them."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from launcher.recipe.task_sections import ClassificationSection
from launcher.tasks import Metrics
from launcher.tasks.classification import classification_metrics, shown_answers
from launcher.training.figures import COLORS, curves_picture
from launcher.training.monitor import Monitor

NAMES = {"labels": ["cat", "dog", "emu"], "label_counts": [5, 3, 2]}


def predictions() -> list[dict[str, Any]]:
    generator = np.random.default_rng(4)
    labels = generator.integers(0, 3, 400)
    logits = generator.normal(size=(400, 3)) + 1.5 * np.eye(3)[labels]
    return [{"logits": row, "labels": np.array(label)} for row, label in zip(logits, labels, strict=True)]


def test_the_area_below_a_drawn_curve_is_that_of_scikit_learn() -> None:
    made = predictions()
    report = classification_metrics(made, ClassificationSection(), NAMES).report
    labels = np.array([int(each["labels"]) for each in made])
    logits = np.stack([each["logits"] for each in made])
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert set(report["curves"]["roc"]) == {"cat", "dog", "emu"}
    for index, name in enumerate(NAMES["labels"]):
        xs, ys = report["curves"]["roc"][name]
        assert len(xs) <= 101
        assert np.trapezoid(ys, xs) == pytest.approx(roc_auc_score(labels == index, scores[:, index]), abs=0.01)
        recall, precision = report["curves"]["precision_recall"][name]
        assert (recall[0], recall[-1], precision[-1]) == (1.0, 0.0, 1.0)


def test_a_class_without_examples_has_no_curve() -> None:
    made = [each for each in predictions() if each["labels"] < 2]
    curves = classification_metrics(made, ClassificationSection(), NAMES).report["curves"]
    assert set(curves["roc"]) == set(curves["precision_recall"]) == {"cat", "dog"}


def test_curves_are_drawn_where_their_points_are() -> None:
    picture = curves_picture({"cat": ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0])})
    color = [int(COLORS[0][place : place + 2], 16) for place in (1, 3, 5)]
    drawn = (picture == color).all(axis=2)
    assert drawn[30:330, 29:32].any(axis=1).all(), "up along the left side"
    assert drawn[29:32, 30:330].any(axis=0).all(), "and along the top"
    assert not drawn[200:320, 200:320].any()


@pytest.mark.parametrize(
    ("kind", "labels", "logits", "expected"),
    [
        ("single_label", np.array(1), [0.0, 3.0, 1.0], {"label": "dog", "predicted": "dog"}),
        ("multi_label", np.array([1.0, 0.0, 1.0]), [2.0, 3.0, -1.0], {"label": "cat, emu", "predicted": "cat, dog"}),
        ("regression", np.array(1.5), [0.25], {"label": "1.5", "predicted": "0.25"}),
    ],
)
def test_samples_are_shown_in_words(kind: Any, labels: Any, logits: list[float], expected: dict[str, str]) -> None:
    made = [{"logits": np.array(logits), "labels": labels}] * 9
    assert shown_answers(made, ClassificationSection(problem_type=kind), NAMES) == [expected] * 8


def test_tensorboard_has_them(make_run: Any) -> None:
    directory, plan = make_run("logging.tensorboard=true")
    monitor = Monitor(plan, directory, 0, torch.device("cpu"))
    report = classification_metrics(predictions(), ClassificationSection(), NAMES).report
    samples = [{"text": "a small animal", "label": "cat", "predicted": "dog"}]
    pictures = {"pictures/0": np.full((8, 8, 1), 200, np.uint8)}
    monitor.record_report(7, Metrics({}, {**report, "samples": samples}, "", pictures))
    monitor.close()
    events = EventAccumulator(str(directory.tensorboard), size_guidance={IMAGES: 0}).Reload()
    expected = {"evaluation/confusion_matrix", "evaluation/roc", "evaluation/precision_recall", "pictures/0"}
    assert set(events.Tags()["images"]) == expected
    assert [event.step for event in events.Images("evaluation/roc")] == [7]
    (text,) = events.Tensors("samples/0/text_summary")
    assert "a small animal" in text.tensor_proto.string_val[0].decode()
