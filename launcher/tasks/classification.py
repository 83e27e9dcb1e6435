"""What tasks with classes (or a number) as targets share: labels, their loss, and scikit-learn's metrics."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the name that every PyTorch reader expects)
from numpy.typing import NDArray
from torch import Tensor

from cluster.validation import near_match
from launcher.data.examples import EncodingError, Field
from launcher.recipe.task_sections import ClassificationSection
from launcher.tasks.base import LossOutput, Metrics
from launcher.tasks.curves import curves

IGNORED = -100
"""Label of a sample that does not count, as in transformers; NaN for numbers."""
SHOWN = 8
"""Samples that an evaluation shows."""


class Labels:
    """Names of the classes and numbers for them: learnt from the training rows, or given by the recipe."""

    def __init__(self, section: ClassificationSection) -> None:
        self.section = section
        self.names: list[str] = list(section.labels)
        self.counts: Counter[str] = Counter()
        self.examples = 0
        self._numbers: dict[str, int] = {}

    def learn(self, values: Iterable[Any]) -> None:
        """Count the labels of all training rows.

        Raises:
            EncodingError: they are fewer than two classes, or not those that the recipe gives.
        """
        for value in values:
            if value is None:
                continue
            self.examples += 1
            if self.section.problem_type != "regression":
                self.counts.update(label_names(value, self.section.problem_type))
        if self.section.problem_type == "regression":
            return
        if not self.names:
            self.names = sorted(self.counts, key=_by_number)
        least = 2 if self.section.problem_type == "single_label" else 1
        present = [name for name in self.names if self.counts[name]]
        if len(present) < least:
            found = ", ".join(map(repr, present)) or "none"
            raise EncodingError(f"the training data must hold examples of {least} classes at least, but has: {found}")
        if isinstance(self.section.class_weights, dict) and set(self.section.class_weights) != set(self.names):
            where = "classification.class_weights"
            raise EncodingError(f"must name each class once; the classes are {', '.join(self.names)}", where)
        missing = [name for name in self.names if not self.counts[name]]
        if missing and self.section.class_weights == "balanced":
            raise EncodingError(
                f"no training example is of class {', '.join(missing)}, so its balanced weight would be infinite; "
                "leave the class out, or give weights",
                "classification.class_weights",
            )
        self._numbers = {name: number for number, name in enumerate(self.names)}

    def field(self) -> Field:
        """Form of a target."""
        if self.section.problem_type == "single_label":
            return Field("int64", ())
        return Field("float32", (len(self.names),) if self.section.problem_type == "multi_label" else ())

    def encode(self, value: Any) -> NDArray[Any] | str:
        """Turn a label into a target, or say what is wrong with it.

        Raises:
            EncodingError: a label that is none of the classes.
        """
        kind = self.section.problem_type
        if value is None:
            return "it has no label"
        if kind == "regression":
            try:
                number = float(value)
            except (TypeError, ValueError):
                raise EncodingError(
                    f"the label {value!r} is no number, but classification.problem_type is regression"
                ) from None
            return np.array(number, np.float32) if np.isfinite(number) else "its label is not a finite number"
        numbers = [self._number(name) for name in label_names(value, kind)]
        if kind == "single_label":
            return np.array(numbers[0], np.int64)
        target = np.zeros(len(self.names), np.float32)
        target[numbers] = 1
        return target

    def facts(self) -> dict[str, Any]:
        """Names and counts of the classes; for `regression` nothing."""
        if self.section.problem_type == "regression":
            return {"labels": []}
        return {
            "labels": self.names,
            "label_counts": [self.counts[name] for name in self.names],
            "labelled_examples": self.examples,
        }

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            raise EncodingError(
                f"the label {name!r} is none of the classes {', '.join(self.names)}; {near_match(name, self.names)}",
                "classification.labels" if self.section.labels else "",
            )
        return self._numbers[name]


def label_names(value: Any, problem_type: str) -> list[str]:
    """Names of the classes in a row's label: one, or a list of them (text is split at commas) for `multi_label`."""
    if problem_type == "single_label":
        if isinstance(value, list | tuple):
            raise EncodingError(
                f"a label is a list ({value}); set problem_type: multi_label", "classification.problem_type"
            )
        return [_name(value)]
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple):
        raise EncodingError(f"the label {value!r} is no list of classes", "classification.problem_type")
    return [_name(part) for part in parts if _name(part)]


def _name(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _by_number(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def class_weights(section: ClassificationSection, facts: Mapping[str, Any]) -> Tensor | None:
    """Weight of each class, scaled so that the mean over the training examples is 1; `None` for equal ones."""
    if section.class_weights is None:
        return None
    counts = np.array(facts["label_counts"], np.float64)
    if section.class_weights == "balanced":
        weights = 1 / np.maximum(counts, 1)
    else:
        weights = np.array([section.class_weights[name] for name in facts["labels"]])
    return torch.from_numpy(weights * counts.sum() / (weights * counts).sum()).float()


def is_counted(labels: Tensor) -> Tensor:
    """Which samples count, bool [samples]: those whose target is not ignored."""
    if not labels.is_floating_point():
        return labels != IGNORED
    counted = ~labels.isnan()
    return counted if labels.ndim == 1 else counted.all(dim=1)


def classification_loss(
    logits: Tensor, labels: Tensor, section: ClassificationSection, weights: Tensor | None
) -> LossOutput:
    """Cross-entropy, binary cross-entropy (mean over the classes) or squared error, summed over samples, in fp32.

    Args:
        logits: [samples, classes], or [samples, 1] for regression.
        labels: int64 [samples], float [samples, classes] or float [samples].
        section: kind of target, and label smoothing.
        weights: of the classes, for `single_label`: each sample's loss is multiplied by its class's.
    """
    logits, counted = logits.float(), is_counted(labels)
    if section.problem_type == "single_label":
        weights = None if weights is None else weights.to(logits.device)
        loss_sum = F.cross_entropy(
            logits, labels, weights, ignore_index=IGNORED, reduction="sum", label_smoothing=section.label_smoothing
        )
    else:
        # A product with zero would keep NaN: samples that do not count get a target first.
        shape = counted if labels.ndim == 1 else counted[:, None]
        targets = torch.where(shape, labels.float(), 0.0)
        if section.problem_type == "multi_label":
            each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1)
        else:
            each = (logits.squeeze(-1) - targets).square()
        loss_sum = (each * counted).sum()
    predictions = {"logits": logits.detach(), "labels": labels.detach()}
    return LossOutput(loss_sum, counted.sum(), predictions=predictions)


def classification_answers(
    logits: NDArray[Any], section: ClassificationSection, facts: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """What a model says of each sample: a class or classes with all probabilities, or a number.

    Args:
        logits: [samples, classes], or [samples, 1] for regression.
        section: kind of target.
        facts: names of the classes.
    """
    if section.problem_type == "regression":
        return [{"value": float(row[0])} for row in logits]
    scores = torch.from_numpy(logits).double()
    several = section.problem_type == "multi_label"
    probabilities = (scores.sigmoid() if several else scores.softmax(dim=1)).tolist()
    names = facts["labels"]
    found = []
    for row in probabilities:
        by_name = dict(zip(names, row, strict=True))
        chosen = [name for name in names if by_name[name] > 0.5] if several else max(names, key=by_name.__getitem__)
        found.append({"labels" if several else "label": chosen, "probabilities": by_name})
    return found


def shown_answers(
    predictions: Sequence[Mapping[str, NDArray[Any]]], section: ClassificationSection, facts: Mapping[str, Any]
) -> list[dict[str, str]]:
    """What the first samples are, and what the model takes them for; in words."""
    names, found = facts["labels"], []
    answers = classification_answers(np.stack([each["logits"] for each in predictions[:SHOWN]]), section, facts)
    for each, answer in zip(predictions[:SHOWN], answers, strict=True):
        if section.problem_type == "regression":
            true, said = f"{float(each['labels']):.4g}", f"{answer['value']:.4g}"
        elif section.problem_type == "multi_label":
            true = ", ".join(name for name, there in zip(names, each["labels"], strict=True) if there > 0.5)
            said = ", ".join(answer["labels"])
        else:
            true, said = names[int(each["labels"])], answer["label"]
        found.append({"label": true, "predicted": said})
    return found


def classification_metrics(
    predictions: Sequence[Mapping[str, NDArray[Any]]], section: ClassificationSection, facts: Mapping[str, Any]
) -> Metrics:
    """Measure predictions with scikit-learn: see each problem type's function."""
    logits = np.stack([each["logits"] for each in predictions]).astype(np.float64)
    labels = np.stack([each["labels"] for each in predictions])
    if section.problem_type == "regression":
        return regression_metrics(logits[:, 0], labels.astype(np.float64))
    if section.problem_type == "multi_label":
        return multi_label_metrics(logits, labels.astype(np.int64), facts)
    return single_label_metrics(logits, labels, facts)


def single_label_metrics(logits: NDArray[np.float64], labels: NDArray[np.int64], facts: Mapping[str, Any]) -> Metrics:
    """Accuracy, precision, recall, F1, MCC, ROC-AUC, PR-AUC, the report and the confusion matrix, by scikit-learn.

    Args:
        logits: [samples, classes].
        labels: [samples].
        facts: names of the classes, and their counts in the training data.
    """
    from sklearn import metrics as sk

    names = list(facts["labels"])
    every = list(range(len(names)))
    predicted = logits.argmax(axis=1)
    values = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "mcc": sk.matthews_corrcoef(labels, predicted),
        "f1_micro": sk.f1_score(labels, predicted, average="micro", labels=every, zero_division=0),
    }
    for average in ("macro", "weighted"):
        parts = sk.precision_recall_fscore_support(labels, predicted, labels=every, average=average, zero_division=0)
        values |= {f"{name}_{average}": parts[i] for i, name in enumerate(("precision", "recall", "f1"))}
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    drawn = slice(1, 2) if len(names) == 2 else slice(None)
    if set(labels.tolist()) == set(every):  # a curve needs examples of both sides
        one_hot = np.eye(len(names))[labels]
        values["roc_auc"] = sk.roc_auc_score(one_hot[:, drawn], probabilities[:, drawn], average="macro")
        values["pr_auc"] = sk.average_precision_score(one_hot[:, drawn], probabilities[:, drawn], average="macro")
    majority = int(np.argmax(facts["label_counts"]))
    values["majority_accuracy"] = float(np.mean(labels == majority))
    options: dict[str, Any] = {"labels": every, "target_names": names, "zero_division": 0}
    text = sk.classification_report(labels, predicted, digits=4, **options)
    report = {
        "classification_report": sk.classification_report(labels, predicted, output_dict=True, **options),
        "confusion_matrix": {"labels": names, "rows": sk.confusion_matrix(labels, predicted, labels=every).tolist()},
        "curves": curves(np.eye(len(names))[labels][:, drawn], probabilities[:, drawn], names[drawn]),
    }
    return Metrics({name: float(value) for name, value in values.items()}, report, str(text))


def multi_label_metrics(logits: NDArray[np.float64], labels: NDArray[np.int64], facts: Mapping[str, Any]) -> Metrics:
    """Exact-match accuracy, F1, ROC-AUC and PR-AUC over classes that may hold together; threshold 0.5.

    Args:
        logits: [samples, classes].
        labels: 0 or 1, [samples, classes].
        facts: names of the classes.
    """
    from sklearn import metrics as sk

    names = list(facts["labels"])
    predicted = (logits > 0).astype(np.int64)
    values = {"accuracy": sk.accuracy_score(labels, predicted), "hamming_loss": sk.hamming_loss(labels, predicted)}
    for average in ("micro", "macro"):
        parts = sk.precision_recall_fscore_support(labels, predicted, average=average, zero_division=0)
        values |= {f"{name}_{average}": parts[i] for i, name in enumerate(("precision", "recall", "f1"))}
    if all(0 < column.sum() < len(column) for column in labels.T):
        values["roc_auc"] = sk.roc_auc_score(labels, logits, average="macro")
        values["pr_auc"] = sk.average_precision_score(labels, logits, average="macro")
    majority = (np.array(facts["label_counts"]) * 2 > facts["labelled_examples"]).astype(np.int64)
    values["majority_f1_micro"] = sk.f1_score(
        labels, np.broadcast_to(majority, labels.shape), average="micro", zero_division=0
    )
    options: dict[str, Any] = {"target_names": names, "zero_division": 0}
    report = {"classification_report": sk.classification_report(labels, predicted, output_dict=True, **options),
              "curves": curves(labels, logits, names)}  # fmt: skip
    text = sk.classification_report(labels, predicted, digits=4, **options)
    return Metrics({name: float(value) for name, value in values.items()}, report, str(text))


def regression_metrics(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> Metrics:
    """Errors and correlations of predicted numbers."""
    from scipy import stats
    from sklearn import metrics as sk

    values = {"mse": sk.mean_squared_error(labels, predicted), "mae": sk.mean_absolute_error(labels, predicted)}
    if len(labels) > 1 and np.ptp(labels) > 0:
        values["r2"] = sk.r2_score(labels, predicted)
        if np.ptp(predicted) > 0:
            values["pearson"] = stats.pearsonr(labels, predicted).statistic
            values["spearman"] = stats.spearmanr(labels, predicted).statistic
    return Metrics({name: float(value) for name, value in values.items()})
