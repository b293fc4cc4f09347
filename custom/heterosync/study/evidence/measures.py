"""What each method reached: metrics per repeat, their mean and spread, and the pooled value with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from heterosync.study.evidence.bootstrap import METRICS, RESAMPLES, bootstrap
from heterosync.study.evidence.outcomes import Outcome, Study, by_series, models_at, sites_of
from heterosync.study.evidence.statistics import (
    Interval,
    Scores,
    clusters_of,
    common_cases,
    interval_of_column,
    mean_sd,
    site_metrics,
)
from heterosync.study.layout import GLOBAL, UNSEEN, RunSpec, own_model
from heterosync.study.table import mean

#: Stand in the place of a model's name where a method has only models of the sites, for the unseen population.
MEAN_OF_MODELS, MEAN_PROBABILITY = "mean over the sites' models", "mean probability of the sites' models"


@dataclass(frozen=True)
class Measurement:
    """One model on one site's test cases in one repeat. values: as `statistics.site_metrics`."""

    spec: RunSpec
    site: str
    model: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """A method at a site over its repeats. values: repeat -> metric (None: not defined), for the unseen population the
    mean over the sites' models where there is no global one; mean, sd: over the `defined` ones (sd: n - 1); pooled:
    the metric of all repeats' cases together; n, n_positive: pooled cases."""

    scenario: str
    level: str
    site: str
    label: str
    metric: str
    values: dict[int, float | None]
    mean: float | None
    sd: float | None
    defined: int
    pooled: Interval
    n: int
    n_positive: int


def measurements(study: Study) -> list[Measurement]:
    """Every finished run's sites; for the unseen population also what the sites' models reach together."""
    found = []
    for outcome in study.outcomes:
        spec = outcome.spec
        for site, scores in outcome.scores.items():
            model = own_model(site) if outcome.personal else GLOBAL
            found.append(Measurement(spec, site, model, site_metrics(scores)))
        for model in sorted(outcome.unseen):
            found.append(Measurement(spec, UNSEEN, model, site_metrics(outcome.unseen[model])))
        if outcome.personal and outcome.unseen:
            found.append(Measurement(spec, UNSEEN, MEAN_OF_MODELS, _mean_of_models(outcome.unseen)))
            found.append(Measurement(spec, UNSEEN, MEAN_PROBABILITY, _of_mean_probability(outcome.unseen)))
    return found


def summaries(study: Study, unit: str = "case", resamples: int = RESAMPLES, seed: int = 0) -> list[Summary]:
    """Every method at every site, metric by metric. The interval comes from resampled `unit`s, and from the same draws
    for methods that scored the same cases."""
    found = []
    for (scenario, level), series in by_series(study).items():
        for site in sites_of(series):
            for label, outcomes in series.items():
                models = models_at(outcomes, site)
                pools = common_cases(models)[0] if models else []
                if not pools or not len(pools[0]):
                    continue
                each = {repeat: _values(outcome, site) for repeat, outcome in sorted(outcomes.items())}
                truth, clusters = pools[0].labels, clusters_of(pools[0], unit)
                column = np.stack([one.scores for one in pools])
                resampled = bootstrap(truth, [column], METRICS, resamples, seed, clusters)
                for metric in METRICS:
                    values = {repeat: of_run[metric] for repeat, of_run in each.items() if of_run}
                    spread = mean_sd(list(values.values()))
                    pooled = interval_of_column(resampled[metric], 0)
                    counts = (len(truth), int(truth.sum()))
                    found.append(Summary(scenario, level, site, label, metric, values, *spread, pooled, *counts))
    return found


def _values(outcome: Outcome, site: str) -> dict[str, Any]:
    """Empty where the run did not test the site."""
    if site == UNSEEN:
        return _mean_of_models(outcome.unseen)
    return site_metrics(outcome.scores[site]) if site in outcome.scores else {}


def _mean_of_models(models: Mapping[str, Scores]) -> dict[str, Any]:
    """The counts are those of one model: all score the same cases."""
    each = [site_metrics(scores) for scores in models.values()]
    return {**each[0], **{name: mean([values[name] for values in each]) for name in METRICS}} if each else {}


def _of_mean_probability(models: Mapping[str, Scores]) -> dict[str, Any]:
    pools, _ = common_cases([{0: scores} for scores in models.values()])
    first = pools[0]
    return site_metrics(Scores(first.ids, first.patients, first.labels, np.mean([one.scores for one in pools], axis=0)))
