"""The CSV tables of a study: every number of its report, for other programs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, fields
from pathlib import Path

from heterosync.files import make_folder, write_text
from heterosync.study.evidence.bootstrap import METRICS
from heterosync.study.evidence.comparisons import Comparisons
from heterosync.study.evidence.measures import Measurement, Summary
from heterosync.study.evidence.outcomes import AnyOutcome, Study
from heterosync.study.evidence.repeats import OverRepeats
from heterosync.study.layout import Done
from heterosync.study.table import csv_table

_COUNTS = ("n", "n_positive", "n_called")
_COSTS = tuple(item.name for item in fields(Done) if item.name != "digest")


def metrics_csv(measurements: Sequence[Measurement]) -> str:
    """Long form, one row per run, site and model; empty where a metric is not defined. n_called: cases predicted
    positive."""
    header = ["scenario", "level", "repeat", "method", "variant", "site", "model", *METRICS, *_COUNTS]
    rows = []
    for one in measurements:
        spec = one.spec
        place = [spec.scenario, spec.level, spec.repeat, spec.method, spec.variant, one.site, one.model]
        rows.append([*place, *(one.values.get(name) for name in (*METRICS, *_COUNTS))])
    return csv_table(header, rows)


def summary_csv(summaries: Sequence[Summary]) -> str:
    """One row per method, site and metric: mean and sd over repeats, and the pooled value with its 95 % interval."""
    header = ["scenario", "level", "site", "label", "metric", "mean", "sd", "repeats", "repeats_defined"]
    header += ["pooled", "ci_low", "ci_high", "redraw_rate", "n", "n_positive"]
    rows = [
        [one.scenario, one.level, one.site, one.label, one.metric, one.mean, one.sd, len(one.values), one.defined]
        + [*astuple(one.pooled), one.n, one.n_positive]
        for one in summaries
    ]
    return csv_table(header, rows)


def comparisons_csv(comparisons: Comparisons) -> str:
    """One row per pair, metric and resampled unit; p values are not corrected for the number of pairs, which stands
    beside them."""
    header = ["scenario", "level", "site", "reference", "label", "metric", "unit", "repeats", "reference_models"]
    header += ["label_models", "reference_value", "label_value", "reference_minus_label", "ci_low", "ci_high"]
    header += [
        "p_uncorrected",
        "p_smoothed_uncorrected",
        "redraw_rate",
        "n",
        "n_positive",
        "units",
        "positive_units",
        "resamples",
    ]
    header += ["pairs_tested", "left_out"]
    rows = [
        [one.scenario, one.level, one.site, one.reference, one.label, one.metric, one.unit]
        + [" ".join(f"r{repeat}" for repeat in one.repeats), *one.models, *astuple(one.comparison)]
        + [comparisons.tested(one.metric, one.unit), "; ".join(one.left_out)]
        for one in comparisons.pairs
    ]
    return csv_table(header, rows)


def repeats_csv(found: Sequence[OverRepeats]) -> str:
    """One row per method and measure; p values are not corrected for the number of rows."""
    header = ["scenario", "level", "label", "measure", "repeats", "mean", "sd", "reference", "paired"]
    header += ["reference_minus_label", "t", "p_uncorrected", "ci_low", "ci_high"]
    rows = [
        [one.scenario, one.level, one.label, one.measure, len(one.values), one.mean, one.sd, one.reference]
        + (list(astuple(one.test)) if one.test else [0, *[None] * 5])
        for one in found
    ]
    return csv_table(header, rows)


def costs_csv(outcomes: Iterable[AnyOutcome]) -> str:
    """One row per finished run; see `layout.Done` for the units."""
    rows = []
    for one in outcomes:
        spec = one.spec
        run = [spec.scenario, spec.level, spec.repeat, spec.method, spec.variant]
        rows.append([*run, *(one.cost[name] for name in _COSTS)])
    return csv_table(["scenario", "level", "repeat", "method", "variant", *_COSTS], rows)


def write_tables(
    study: Study,
    measurements: Sequence[Measurement],
    summaries: Sequence[Summary],
    comparisons: Comparisons | None,
    folder: Path | str,
) -> list[Path]:
    """Write metrics.csv, summary.csv, costs.csv and, where there is something to compare, comparisons.csv."""
    folder = make_folder(folder)
    texts = {
        "metrics.csv": metrics_csv(measurements),
        "summary.csv": summary_csv(summaries),
        "costs.csv": costs_csv(study.outcomes),
        **({"comparisons.csv": comparisons_csv(comparisons)} if comparisons else {}),
    }
    return [write_text(folder / name, text) for name, text in texts.items()]
