"""Metrics of binary scores: AUC, and accuracy, recall, precision at threshold 0.5 (paper, Statistical analysis).

They agree with scikit-learn's (a test holds this), but equal AUCs are equal to the last bit here, as choosing the later
of two equal rounds needs; scikit-learn sums trapezia, which rounds differently for each curve.
"""

from __future__ import annotations

import math

import numpy as np

THRESHOLD = 0.5
_Z95 = 1.959963984540054


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve by ranks, ties counted half; None if a class is absent."""
    labels = np.asarray(labels)
    positives = int((labels == 1).sum())
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    _, inverse, counts = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of equal scores, from 1
    return float((ranks[labels == 1].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_interval(value: float, positives: int, negatives: int) -> tuple[float, float]:
    """95 % interval: the AUCs whose Hanley-McNeil (1982) standard error reaches `value`, found by bisection.

    Taking the error at the candidate, not at `value`, keeps the interval wide where it must be: an AUC of 1 from two
    positives is no certainty.
    """

    def error(area: float) -> float:
        q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
        spread = area * (1 - area) + (positives - 1) * (q1 - area**2) + (negatives - 1) * (q2 - area**2)
        return math.sqrt(max(spread, 0.0) / (positives * negatives))

    def edge(inside: float, outside: float, sign: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            if sign * (middle - value) <= _Z95 * error(middle):
                inside = middle
            else:
                outside = middle
        return inside

    return edge(value, 0.0, -1.0), edge(value, 1.0, 1.0)


def binary_metrics(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """auc, ci_low, ci_high (95 %, of the AUC), accuracy, recall, precision, n, n_positive.

    A value that is not defined is None: AUC with one class, recall without positives. Precision without a positive
    prediction is 0, as in scikit-learn.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities)
    positive, called = labels == 1, probabilities >= THRESHOLD
    n, n_positive, hits = len(labels), int(positive.sum()), int((positive & called).sum())
    area = auc(labels, probabilities)
    low, high = auc_interval(area, n_positive, n - n_positive) if area is not None else (None, None)
    return {
        "auc": area,
        "ci_low": low,
        "ci_high": high,
        "accuracy": float((positive == called).mean()) if n else None,
        "recall": hits / n_positive if n_positive else None,
        "precision": hits / int(called.sum()) if called.any() else (0.0 if n else None),
        "n": n,
        "n_positive": n_positive,
    }
