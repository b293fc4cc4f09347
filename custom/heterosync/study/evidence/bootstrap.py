"""Bootstrap resamples of binary scores: AUC, accuracy, recall and precision of many score columns on the same draws.

A resample is held as the number of times each case was drawn. A case's rank among the others does not change with the
draw, so that the AUC of every resample comes from one sort of the scores and sums of counts (Mann-Whitney form, ties
counted half), exactly: the sums are of whole numbers, and equal AUCs are equal to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from heterosync.training.metrics import THRESHOLD

METRICS = ("auc", "accuracy", "recall", "precision")
RESAMPLES = 1000
#: Counts held in memory at once (4 bytes each).
_COUNTS_AT_ONCE = 500_000


@dataclass(frozen=True, eq=False)
class Resampled:
    """One metric of m columns. estimate: (m,) on the cases themselves; values: (resamples, m); NaN where not defined.

    redraw_rate: share of all draws that lacked a class and were drawn again.
    """

    estimate: np.ndarray
    values: np.ndarray
    redraw_rate: float


class Draws:
    """Resamples with replacement as counts, a block (b, n) at a time; the same for a seed, whatever the block size.

    labels: (n,) of 0 and 1. clusters: (n,) any values; None draws single cases, else whole clusters, as many as there
    are. A resample that lacks a class is drawn again where the cases have both; `redraw_rate` counts them, and is known
    once all blocks were taken.
    """

    def __init__(self, labels: np.ndarray, resamples: int, seed: int, clusters: np.ndarray | None = None):
        self._positive = labels == 1
        self._resamples = resamples
        self._rng = np.random.default_rng(seed)
        self._unit = None if clusters is None else np.unique(clusters, return_inverse=True)[1]
        self.units = len(labels) if self._unit is None else int(self._unit.max()) + 1
        self.redraw_rate = 0.0

    def __iter__(self) -> Iterator[np.ndarray]:
        positive = self._positive
        two_classes = positive.any() and not positive.all()
        block = max(1, min(self._resamples, _COUNTS_AT_ONCE // len(positive)))
        kept = redrawn = 0
        while kept < self._resamples:
            counts = self._draw(block)
            good = np.ones(block, dtype=bool)
            if two_classes:
                good = counts[:, positive].any(axis=1) & counts[:, ~positive].any(axis=1)
            missing = self._resamples - kept
            if good.sum() >= missing:  # what was drawn beyond the last one needed does not count
                good = good[: np.flatnonzero(good)[missing - 1] + 1]
            kept += int(good.sum())
            redrawn += int((~good).sum())
            yield counts[: len(good)][good]
        self.redraw_rate = redrawn / (kept + redrawn)

    def _draw(self, block: int) -> np.ndarray:
        picks = self._rng.integers(0, self.units, (block, self.units))
        picks += np.arange(block)[:, None] * self.units
        counts = np.bincount(picks.ravel(), minlength=block * self.units).reshape(block, self.units)
        counts = counts.astype(np.float32)  # exact: sums stay far below 2**24
        return counts if self._unit is None else counts[:, self._unit]


def bootstrap(
    labels: np.ndarray,
    columns: Sequence[np.ndarray],
    metrics: Sequence[str] = ("auc",),
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: np.ndarray | None = None,
) -> dict[str, Resampled]:
    """Each metric of each column on the same resamples.

    labels: (n,) of 0 and 1. A column is the scores (n,) of one model, or (k, n) of k models of which the mean metric is
    taken. Raises `ValueError` for other shapes, labels or metrics, and for scores that are not finite.
    """
    labels, flat, bounds = _checked(labels, columns, metrics, resamples, clusters)

    of_models = _Measure(labels, flat, metrics)

    def measure(counts: np.ndarray) -> dict[str, np.ndarray]:
        return {
            name: np.stack([values[:, start:stop].mean(axis=1) for start, stop in bounds], axis=1)
            for name, values in of_models(counts).items()
        }

    estimate = measure(np.ones((1, len(labels)), dtype=np.float32))
    draws = Draws(labels, resamples, seed, clusters)
    blocks = [measure(counts) for counts in draws]
    return {
        name: Resampled(estimate[name][0], np.concatenate([block[name] for block in blocks]), draws.redraw_rate)
        for name in metrics
    }


def _checked(
    labels: np.ndarray,
    columns: Sequence[np.ndarray],
    metrics: Sequence[str],
    resamples: int,
    clusters: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    labels = np.asarray(labels)
    rows = [np.atleast_2d(np.asarray(column, dtype=float)) for column in columns]
    if labels.ndim != 1 or not len(labels) or not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be a non-empty vector of 0 and 1")
    if any(row.ndim != 2 or not len(row) or row.shape[1] != len(labels) for row in rows):
        raise ValueError(f"every column must hold {len(labels)} scores, one for each label")
    if not all(np.isfinite(row).all() for row in rows):
        raise ValueError("scores must be finite")
    if clusters is not None and np.shape(clusters) != labels.shape:
        raise ValueError(f"clusters must be {len(labels)} values, one for each label")
    if resamples < 1:
        raise ValueError("resamples must be at least 1")
    if unknown := [name for name in metrics if name not in METRICS]:
        raise ValueError(f"unknown metric {unknown[0]}; known: {', '.join(METRICS)}")
    stops = np.cumsum([len(row) for row in rows]).tolist()
    return labels, np.concatenate(rows), list(zip([0, *stops[:-1]], stops, strict=True))


class _Measure:
    """Metrics of fixed scores (m, n) for any counts (b, n); what does not depend on the counts is worked out once."""

    def __init__(self, labels: np.ndarray, scores: np.ndarray, metrics: Sequence[str]):
        self._metrics = metrics
        self._positive = labels == 1
        called = scores >= THRESHOLD
        self._right = (called == self._positive).T.astype(np.float32)
        self._hits = (called & self._positive).T.astype(np.float32)
        self._called = called.T.astype(np.float32)
        self._ranks = [self._rank(row) for row in scores] if "auc" in metrics else []

    def _rank(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of the negatives, and for each positive how many negatives score less, and not more."""
        negatives, positives = scores[~self._positive], scores[self._positive]
        order = np.argsort(negatives, kind="stable")
        ranked = negatives[order]
        return order, np.searchsorted(ranked, positives, "left"), np.searchsorted(ranked, positives, "right")

    def __call__(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Metric -> (b, m); NaN where not defined."""
        positives = counts[:, self._positive].sum(axis=1, dtype=float)[:, None]
        found = {}
        with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is NaN: not defined
            if "auc" in self._metrics:
                found["auc"] = self._aucs(counts)
            if "accuracy" in self._metrics:
                found["accuracy"] = (counts @ self._right) / counts.sum(axis=1, dtype=float)[:, None]
            if "recall" in self._metrics:
                found["recall"] = (counts @ self._hits) / positives
            if "precision" in self._metrics:  # 0 where no case is called positive
                found["precision"] = (counts @ self._hits).astype(float) / np.maximum(counts @ self._called, 1)
        return found

    def _aucs(self, counts: np.ndarray) -> np.ndarray:
        of_positives, of_negatives = counts[:, self._positive], counts[:, ~self._positive]
        pairs = of_positives.sum(axis=1, dtype=float) * of_negatives.sum(axis=1, dtype=float)
        below = np.zeros((len(counts), of_negatives.shape[1] + 1), dtype=np.float32)
        areas = np.empty((len(counts), len(self._ranks)))
        for column, (order, lower, upper) in enumerate(self._ranks):
            np.cumsum(np.take(of_negatives, order, axis=1), axis=1, out=below[:, 1:])
            wins = np.take(below, lower, axis=1) + np.take(below, upper, axis=1)  # twice, so that a tie counts half
            areas[:, column] = (of_positives * wins).sum(axis=1, dtype=float) / (2 * pairs)
        return areas
