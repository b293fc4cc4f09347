"""Metrics, intervals and tests of a study (Hu et al., Nature Communications 2025, Statistical analysis).

The predictions of a site's repeats are pooled; 1000 bootstrap resamples of the pooled cases, the same for both methods
of a pair, give a percentile interval and a two-tailed p value: twice the share of resamples in which the difference
has the opposite sign of the observed one or none. The paper corrects nothing for the number of pairs, nor does this.

The pooled AUC also ranks cases of one repeat's model against those of another's: where their scores are on different
scales it lies below the mean of the repeats' AUCs, which is reported beside it.

Pooled repeats hold the same image more than once, and one patient may have several: cases are then not independent,
and intervals over single cases are too narrow. `clusters` resamples whole images or whole patients instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.stats import ttest_rel

from heterosync.study.evidence.bootstrap import METRICS, RESAMPLES, Draws, Resampled, bootstrap
from heterosync.training.metrics import THRESHOLD, binary_metrics

ALPHA = 0.05
#: What is drawn in a resample: single cases (the paper), or all cases of an image or of a patient together.
UNITS = ("case", "image", "patient")
_PERCENTILES = (100 * ALPHA / 2, 100 * (1 - ALPHA / 2))


@dataclass(frozen=True, eq=False)
class Scores:
    """Scored cases, four vectors of one length. labels: 0 or 1; scores: probability of 1; patients: "" if unknown."""

    ids: np.ndarray
    patients: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> Scores:
        """The cases at these positions, in this order."""
        return Scores(self.ids[rows], self.patients[rows], self.labels[rows], self.scores[rows])


@dataclass(frozen=True)
class Interval:
    """A metric with its 95 % percentile interval; None where it is not defined."""

    estimate: float | None
    low: float | None
    high: float | None
    redraw_rate: float


@dataclass(frozen=True)
class Comparison:
    """Method a against method b on the same cases; None where the metric is not defined (an AUC needs both classes).

    difference: a - b, with its 95 % percentile interval; p: as in the paper, 0 if no resample reversed the difference;
    p_smoothed: 2(c + 1) / (resamples + 1), never 0; redraw_rate: share of draws that lacked a class and were drawn
    again; n, n_positive: pooled cases; units: how many cases, images or patients were drawn from, positive_units: how
    many of them have a positive case. With few of these (or few without) the interval is too narrow, whatever it says.
    """

    estimate_a: float | None
    estimate_b: float | None
    difference: float | None
    ci_low: float | None
    ci_high: float | None
    p: float | None
    p_smoothed: float | None
    redraw_rate: float
    n: int
    n_positive: int
    units: int
    positive_units: int
    resamples: int


@dataclass(frozen=True, eq=False)
class RocBand:
    """Mean TPR of the resampled ROC curves at common FPRs, and the 95 % percentile band around it; vectors of one
    length."""

    fpr: np.ndarray
    tpr: np.ndarray
    low: np.ndarray
    high: np.ndarray


def site_metrics(scores: Scores) -> dict[str, float | int | None]:
    """auc, accuracy, recall, precision at threshold 0.5, n, n_positive, n_called (predicted positive).

    None where not defined: AUC with one class, recall without positives. Precision without a positive prediction is 0
    and enters means as such; `n_called` tells.
    """
    found = binary_metrics(scores.labels, scores.scores)
    called = int((scores.scores >= THRESHOLD).sum())
    counts = {"n": len(scores), "n_positive": int(scores.labels.sum()), "n_called": called}
    return {**{name: found[name] for name in METRICS}, **counts}


def mean_sd(values: Sequence[float | None]) -> tuple[float | None, float | None, int]:
    """Mean and sample standard deviation (n - 1) of those that are defined, and their number."""
    known = [value for value in values if value is not None]
    mean = float(np.mean(known)) if known else None
    return mean, float(np.std(known, ddof=1)) if len(known) > 1 else None, len(known)


@dataclass(frozen=True)
class PairedTest:
    """Mean of a - b over `n` pairs, Student's t, two-sided p, and the 95 % interval of the mean."""

    n: int
    difference: float
    t: float
    p: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | None]:
        """Plain values; t is None where it is infinite, which JSON has not."""
        return asdict(self) | {"t": self.t if np.isfinite(self.t) else None}


def paired_test(a: Sequence[float], b: Sequence[float]) -> PairedTest:
    """Two-sided paired t-test of two or more pairs. Where all differ by the same, but for rounding, there is no spread
    to test by: t is infinite and p 0, and t is 0 and p 1 where they are equal."""
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    n, mean = len(differences), float(differences.mean())
    if np.ptp(differences) < 1e-12:
        equal = abs(mean) < 1e-12
        return PairedTest(n, mean, 0.0 if equal else float(np.copysign(np.inf, mean)), float(equal), mean, mean)
    outcome = ttest_rel(a, b)
    low, high = outcome.confidence_interval(1 - ALPHA)
    return PairedTest(n, mean, float(outcome.statistic), float(outcome.pvalue), float(low), float(high))


def pool(parts: Sequence[Scores]) -> Scores:
    """The cases of several repeats in one; an image that was tested in several is there several times."""
    names = ("ids", "patients", "labels", "scores")
    return Scores(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def clusters_of(scores: Scores, unit: str) -> np.ndarray | None:
    """Which cases are drawn together, for `bootstrap`; None for single cases. A case of unknown patient counts as a
    patient of its own image."""
    if unit == "case":
        return None
    if unit == "image":
        return scores.ids
    if unit != "patient":
        raise ValueError(f"unknown unit {unit}; known: {', '.join(UNITS)}")
    known = [f"patient {p}" if p else f"image {i}" for p, i in zip(scores.patients, scores.ids, strict=True)]
    return np.array(known)


def p_values(difference: float, resampled: np.ndarray) -> tuple[float, float]:
    """Two-tailed p from the resamples whose difference is 0 or has the other sign, as the paper has it and smoothed."""
    reversed_ = int((resampled * np.sign(difference) <= 0).sum())
    return min(1.0, 2 * reversed_ / len(resampled)), min(1.0, 2 * (reversed_ + 1) / (len(resampled) + 1))


def paired_bootstrap(
    labels: np.ndarray,
    scores_a: np.ndarray,
    scores_b: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    metric: str = "auc",
) -> Comparison:
    """Compare two methods that scored the same cases in the same order.

    labels: (n,); scores: (n,), or (k, n) for a method of k models, whose mean metric is taken. The result is the same
    for a seed and does not depend on which method comes first.
    """
    found = bootstrap(labels, [scores_a, scores_b], (metric,), resamples, seed, clusters)[metric]
    return compare_columns(found, 0, 1, labels, clusters)


def compare_columns(
    found: Resampled, a: int, b: int, labels: np.ndarray, clusters: np.ndarray | None = None
) -> Comparison:
    """Two columns of one `bootstrap` over `labels` and `clusters`, as a comparison."""
    clusters = np.arange(len(labels)) if clusters is None else clusters
    values = {
        name: None if np.isnan(found.estimate[i]) else float(found.estimate[i]) for name, i in (("a", a), ("b", b))
    }
    difference = low = high = p = smoothed = None
    if values["a"] is not None and values["b"] is not None:
        difference = values["a"] - values["b"]
        resampled = found.values[:, a] - found.values[:, b]
        low, high = map(float, np.percentile(resampled, _PERCENTILES))
        p, smoothed = p_values(difference, resampled)
    return Comparison(
        estimate_a=values["a"],
        estimate_b=values["b"],
        difference=difference,
        ci_low=low,
        ci_high=high,
        p=p,
        p_smoothed=smoothed,
        redraw_rate=found.redraw_rate,
        n=len(labels),
        n_positive=int(np.sum(labels)),
        units=len(np.unique(clusters)),
        positive_units=len(np.unique(clusters[np.asarray(labels) == 1])),
        resamples=len(found.values),
    )


def interval(
    labels: np.ndarray,
    scores: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    metric: str = "auc",
) -> Interval:
    """A metric of one method with its 95 % percentile interval; scores (n,), or (k, n) for the mean over k models."""
    found = bootstrap(labels, [scores], (metric,), resamples, seed, clusters)[metric]
    return interval_of_column(found, 0)


def interval_of_column(found: Resampled, column: int) -> Interval:
    estimate = float(found.estimate[column])
    if np.isnan(estimate):
        return Interval(None, None, None, found.redraw_rate)
    low, high = np.percentile(found.values[:, column], _PERCENTILES)
    return Interval(estimate, float(low), float(high), found.redraw_rate)


def roc_band(
    labels: np.ndarray,
    scores: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    clusters: np.ndarray | None = None,
    points: int = 101,
) -> RocBand | None:
    """Vertical average of the resampled ROC curves (Fawcett 2006), on `points` equally spaced FPRs; None with one
    class."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=float)
    if labels.min() == labels.max():
        return None
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # last case of each run of equal scores
    positive = labels[order] == 1
    fpr = np.linspace(0, 1, points)
    curves = []
    for counts in Draws(labels, resamples, seed, clusters):
        drawn = np.take(counts, order, axis=1)
        true, false = (np.cumsum(drawn * which, axis=1, dtype=float)[:, ends] for which in (positive, ~positive))
        for hits, alarms in zip(true, false, strict=True):
            curve = np.interp(fpr, np.append(0, alarms / alarms[-1]), np.append(0, hits / hits[-1]))
            curve[0] = 0.0  # every curve starts in the corner
            curves.append(curve)
    low, high = np.percentile(curves, _PERCENTILES, axis=0)
    return RocBand(fpr, np.mean(curves, axis=0), low, high)


Key = tuple[int, str]


def common_cases(series: Sequence[Mapping[int, Scores]]) -> tuple[list[Scores], list[str]]:
    """The cases that every series (repeat -> scores) has, pooled over the common repeats in one canonical order.

    Returns one pool per series, row by row the same cases, and a line for each kind of case that was left out: a repeat
    or ids that one series lacks, or ids whose labels differ. The pools are empty when nothing is common.
    """
    repeats = sorted(set.intersection(*(set(one) for one in series)))
    left_out = []
    if alone := sorted(set.union(*(set(one) for one in series)) - set(repeats)):
        left_out.append(f"{_named('repeat', [f'r{r}' for r in alone])} not in all")
    pools: list[list[Scores]] = [[] for _ in series]
    for repeat in repeats:
        parts = [one[repeat] for one in series]
        tables = [dict(zip(part.ids.tolist(), part.labels.tolist(), strict=True)) for part in parts]
        shared = set.intersection(*(set(table) for table in tables))
        if lone := sorted(set.union(*(set(table) for table in tables)) - shared):
            left_out.append(f"r{repeat}: {_named('case', lone)} not in all")
        differing = {i for i in shared if len({table[i] for table in tables}) > 1}
        if differing:
            left_out.append(f"r{repeat}: {_named('case', sorted(differing))} with different labels")
        kept = sorted(shared - differing)
        for pool_, part in zip(pools, parts, strict=True):
            place = {case: row for row, case in enumerate(part.ids.tolist())}
            pool_.append(part.take(np.array([place[case] for case in kept], dtype=int)))
    empty = Scores(*(np.array([], dtype=kind) for kind in (str, str, int, float)))
    return [pool(parts) if parts else empty for parts in pools], left_out


def _named(what: str, names: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(names[:most]) + (", …" if len(names) > most else "")
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown})"
