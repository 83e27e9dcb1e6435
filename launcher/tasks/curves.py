"""ROC and precision-recall curves, as points to draw."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

POINTS = 101
"""Of a curve, at most; spread evenly over those that scikit-learn finds."""
MOST = 10
"""Classes that get curves: the most frequent ones."""

Curves = dict[str, dict[str, list[list[float]]]]
"""Kind of curve -> class -> its x and its y."""


def curves(is_class: NDArray[Any], scores: NDArray[np.float64], names: Sequence[str]) -> Curves:
    """Curves of each class against all others.

    Args:
        is_class: 0 or 1, [samples, classes].
        scores: larger for what is likelier, [samples, classes].
        names: of the classes.

    Returns:
        `roc` (false and true positive rates) and `precision_recall` (recall and precision) of the classes that have
        examples of both sides.
    """
    from sklearn import metrics as sk

    found: Curves = {"roc": {}, "precision_recall": {}}
    counts = is_class.sum(axis=0)
    for index in np.argsort(-counts, kind="stable")[:MOST].tolist():
        true, score, name = is_class[:, index], scores[:, index], names[index]
        if not 0 < counts[index] < len(true):
            continue
        false_positive, true_positive, _ = sk.roc_curve(true, score)
        precision, recall, _ = sk.precision_recall_curve(true, score)
        found["roc"][name] = _thinned(false_positive, true_positive)
        found["precision_recall"][name] = _thinned(recall, precision)
    return found


def _thinned(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> list[list[float]]:
    kept = np.unique(np.linspace(0, len(xs) - 1, min(len(xs), POINTS)).round().astype(int))
    return [np.round(values[kept], 6).tolist() for values in (xs, ys)]
