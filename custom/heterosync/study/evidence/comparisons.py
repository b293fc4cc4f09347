"""Every method of a study against one of them, site by site, on the cases that both scored in the same repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heterosync.errors import UserError, nearest
from heterosync.study.evidence.bootstrap import METRICS, RESAMPLES, bootstrap
from heterosync.study.evidence.outcomes import Outcome, Study, by_series, models_at, sites_of
from heterosync.study.evidence.statistics import (
    ALPHA,
    UNITS,
    Comparison,
    Scores,
    clusters_of,
    common_cases,
    compare_columns,
)

REFERENCE = "hsl"


@dataclass(frozen=True)
class Pair:
    """One row of the comparison table: the reference (a) against `label` (b), so that a positive difference favours the
    reference.

    repeats: those that both have; unit: what was resampled; models: how many models stand behind each value (more than
    one for the unseen population where a method has only models of the sites: the mean of their metrics is compared);
    left_out: what only one of the two has.
    """

    scenario: str
    level: str
    site: str
    reference: str
    label: str
    metric: str
    unit: str
    repeats: tuple[int, ...]
    models: tuple[int, int]
    comparison: Comparison
    left_out: tuple[str, ...]


@dataclass(frozen=True)
class Comparisons:
    """pairs: in the order of scenario, site, method, metric, unit; problems: a line for each pair that could not be
    compared."""

    pairs: list[Pair]
    problems: list[str]

    def tested(self, metric: str = "auc", unit: str = "case") -> int:
        """How many pairs have a p value."""
        return sum((p.metric, p.unit) == (metric, unit) and p.comparison.p is not None for p in self.pairs)

    def note(self, metric: str = "auc", unit: str = "case") -> str:
        """What a reader of the p values must know."""
        n = self.tested(metric, unit)
        return (
            f"{n} pairs were tested for {metric}; p values are not corrected for their number, as in the paper: about "
            f"{ALPHA * n:.1f} would lie below {ALPHA} by chance if no method differed."
        )


def compare(
    study: Study,
    reference: str = REFERENCE,
    metrics: Sequence[str] = METRICS,
    units: Sequence[str] = UNITS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparisons:
    """Every method against `reference`, a label. Resampling by patient is left out where no patient is known.

    Raises `UserError` when no run of `reference` has been finished.
    """
    labels = sorted({outcome.spec.label for outcome in study.outcomes})
    if reference not in labels:
        known = nearest(reference, labels)
        raise UserError(f"{study.folder} holds no finished run of '{reference}' to compare with: {known}")
    pairs: list[Pair] = []
    problems: list[str] = []
    for (scenario, level), series in by_series(study).items():
        if reference not in series:
            problems.append(f"{scenario} {level}: no finished run of '{reference}', nothing is compared there")
            continue
        for site in sites_of(series):
            site_ = _Site(scenario, level, site, reference)
            for label in series:
                if label != reference:
                    site_.add(label, series[reference], series[label])
            pairs += site_.compared(metrics, units, resamples, seed)
            problems += site_.problems
    return Comparisons(pairs, problems)


@dataclass(frozen=True, eq=False)
class _Matched:
    label: str
    reference: list[Scores]
    method: list[Scores]
    repeats: tuple[int, ...]
    left_out: tuple[str, ...]

    def same_cases(self) -> tuple[object, ...]:
        """Equal for methods whose pairs with the reference rest on the same cases."""
        return (self.repeats, tuple(self.reference[0].ids.tolist()))

    def columns(self) -> list[np.ndarray]:
        return [np.stack([one.scores for one in pools]) for pools in (self.reference, self.method)]


class _Site:
    """The pairs of one site; methods that scored the same cases share one bootstrap, which changes nothing but time."""

    def __init__(self, scenario: str, level: str, site: str, reference: str):
        self.place = (scenario, level, site, reference)
        self.problems: list[str] = []
        self._matched: list[_Matched] = []

    def add(self, label: str, reference: dict[int, Outcome], method: dict[int, Outcome]) -> None:
        scenario, level, site, name = self.place
        where = f"{scenario} {level} {site}: {name} and {label}"
        ours, theirs = models_at(reference, site), models_at(method, site)
        if not ours or not theirs:
            self.problems.append(f"{where}: not compared, {label if ours else name} was not tested there")
            return
        pools, left_out = common_cases([*ours, *theirs])
        self.problems += [f"{where}: {line}, left out" for line in left_out]
        if not len(pools[0]):
            self.problems.append(f"{where}: not compared, no case was scored by both in the same repeat")
            return
        repeats = sorted(set.intersection(*(set(one) for one in [*ours, *theirs])))
        of_reference, of_method = pools[: len(ours)], pools[len(ours) :]
        self._matched.append(_Matched(label, of_reference, of_method, tuple(repeats), tuple(left_out)))

    def compared(self, metrics: Sequence[str], units: Sequence[str], resamples: int, seed: int) -> list[Pair]:
        groups: dict[tuple[object, ...], list[_Matched]] = {}
        for one in self._matched:
            groups.setdefault(one.same_cases(), []).append(one)
        found: dict[str, list[Pair]] = {one.label: [] for one in self._matched}
        for group in groups.values():
            cases = group[0].reference[0]
            columns = [group[0].columns()[0], *(one.columns()[1] for one in group)]
            for unit in units:
                if unit == "patient" and not (cases.patients != "").any():
                    continue
                clusters = clusters_of(cases, unit)
                resampled = bootstrap(cases.labels, columns, metrics, resamples, seed, clusters)
                for column, one in enumerate(group, start=1):
                    for metric in metrics:
                        comparison = compare_columns(resampled[metric], 0, column, cases.labels, clusters)
                        found[one.label].append(self._pair(one, metric, unit, comparison))
        return [pair for pairs in found.values() for pair in pairs]

    def _pair(self, matched: _Matched, metric: str, unit: str, comparison: Comparison) -> Pair:
        models = (len(matched.reference), len(matched.method))
        return Pair(*self.place, matched.label, metric, unit, matched.repeats, models, comparison, matched.left_out)
