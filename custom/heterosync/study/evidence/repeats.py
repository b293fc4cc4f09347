"""What a training ends at as a whole, repeat by repeat; every method against one of them, and against itself under
another anchor task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from heterosync.study.evidence.outcomes import Outcome, Study, by_series
from heterosync.study.evidence.statistics import PairedTest, mean_sd, paired_test, site_metrics
from heterosync.study.layout import UNSEEN
from heterosync.study.table import mean

#: Rounds at the end of a training over which `fluctuation` is taken.
LAST_ROUNDS = 4
#: The measures, and what a page calls them.
MEASURES = {
    "sites": "mean of the sites",
    "worst": "worst site",
    UNSEEN: "unseen images",
    "fluctuation": f"fluctuation over the last {LAST_ROUNDS} rounds",
}


@dataclass(frozen=True)
class OverRepeats:
    """A method over its repeats, and what it is held against, `reference`, minus it over those that both have.

    sites, worst: mean and least test AUC over the sites where it is defined; unseen: AUC on the unseen images, for
    methods with a model per site the mean over these; fluctuation: standard deviation, over the last `LAST_ROUNDS`
    rounds, of the mean validation AUC of what the sites received. values: repeat -> measure; mean, sd (n - 1): over
    those; reference: the label of another method, or the name of another scenario; test: of the repeats that both
    have, None below two.
    """

    scenario: str
    level: str
    label: str
    measure: str
    values: dict[int, float]
    mean: float | None
    sd: float | None
    reference: str
    test: PairedTest | None


def over_repeats(study: Study, reference: str) -> list[OverRepeats]:
    """Every method of every scenario and level, measure by measure, in the order of the plan; without differences for
    `reference` itself and where it was not run."""
    found = []
    for (scenario, level), series in by_series(study).items():
        for measure in MEASURES:
            made = {label: _each(outcomes, measure) for label, outcomes in series.items()}
            for label, values in made.items():
                other = made.get(reference, {}) if label != reference else {}
                found.append(_held_against(reference, other, values, scenario, level, label, measure))
    return found


def over_anchors(study: Study) -> list[OverRepeats]:
    """Every method of a scenario with an anchor task of its own; `reference` is the first scenario of the plan that
    differs from it in nothing else, so that the repeats have the same images, splits and first weights."""
    series, found = by_series(study), []
    first: dict[tuple[Any, ...], tuple[str, Any]] = {}
    for entry in study.plan["scenarios"]:
        name = entry["name"]
        scale, anchor = (study.plan.get(key) if entry[key] is None else entry[key] for key in ("scale", "anchor"))
        plain, its_anchor = first.setdefault((entry["scenario"], scale, entry["any_domain"]), (name, anchor))
        if anchor == its_anchor:
            continue
        for (scenario, level), methods in series.items():
            for label, outcomes in methods.items() if scenario == name else ():
                others = series.get((plain, level), {}).get(label, {})
                for measure in MEASURES:
                    sides = _each(others, measure), _each(outcomes, measure)
                    found.append(_held_against(plain, *sides, scenario, level, label, measure))
    return found


def _held_against(
    reference: str,
    other: dict[int, float],
    values: dict[int, float],
    scenario: str,
    level: str,
    label: str,
    measure: str,
) -> OverRepeats:
    average, sd, _ = mean_sd(list(values.values()))
    both = sorted(other.keys() & values.keys())
    tested = paired_test(*([side[repeat] for repeat in both] for side in (other, values))) if len(both) > 1 else None
    return OverRepeats(scenario, level, label, measure, values, average, sd, reference, tested)


def _each(outcomes: Mapping[int, Outcome], measure: str) -> dict[int, float]:
    values = {repeat: _measure(outcome, measure) for repeat, outcome in sorted(outcomes.items())}
    return {repeat: value for repeat, value in values.items() if value is not None}


def _measure(outcome: Outcome, measure: str) -> float | None:
    if measure == "fluctuation":
        return _fluctuation(outcome)
    of = outcome.unseen if measure == UNSEEN else outcome.scores
    known = [value for scores in of.values() if (value := site_metrics(scores)["auc"]) is not None]
    if measure == "worst":
        return min(known, default=None)
    return mean(known)


def _fluctuation(outcome: Outcome) -> float | None:
    rounds: dict[int, list[float]] = {}
    for round_, _, metric, value in outcome.history:
        if metric == "val_auc_received":
            rounds.setdefault(round_, []).append(value)
    last = [float(np.mean(rounds[round_])) for round_ in sorted(rounds)[-LAST_ROUNDS:]]
    return float(np.std(last, ddof=1)) if len(last) == LAST_ROUNDS else None
