"""The tables on the page of a study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from heterosync.errors import UserError
from heterosync.methods import make_method
from heterosync.study.evidence.comparisons import Comparisons, Pair
from heterosync.study.evidence.measures import MEAN_PROBABILITY, Summary
from heterosync.study.evidence.outcomes import AnyOutcome
from heterosync.study.evidence.repeats import MEASURES, OverRepeats
from heterosync.study.evidence.statistics import Comparison
from heterosync.study.layout import NO_LEVEL, UNSEEN
from heterosync.study.pages import html
from heterosync.study.pages.by_scenario import Scenario
from heterosync.study.pages.maps import MapNumbers
from heterosync.study.table import ABSENT, mean, number, with_interval

NOT_DEFINED = "not defined"
#: Longer tables stay in the CSV files.
MOST_ROWS = 160

Rows = tuple[list[str], list[list[str]]]


def auc_tables(scenario: Scenario) -> list[str]:
    """Mean and spread of the test AUC: methods down, sites across; one table per site with its levels where there are
    levels."""
    if not scenario.has_levels:
        level = scenario.levels[0]
        columns = [(site, level, site) for site in scenario.sites]
        return [_auc_table(scenario, columns, "Test AUC, mean ± standard deviation over the repeats")]
    return [
        _auc_table(
            scenario,
            [(level, level, site) for level in scenario.levels],
            f"Test AUC at {site} by level, mean ± standard deviation over the repeats",
        )
        for site in scenario.sites
    ]


def _auc_table(scenario: Scenario, columns: Sequence[tuple[str, str, str]], caption: str) -> str:
    header = ["method", *(f"{name} ({scenario.counts(level, site)[1]}+)" for name, level, site in columns)]
    if not scenario.has_levels:
        header.append("mean of sites")
    found = {
        label: [scenario.summaries.get((level, site, label)) for _, level, site in columns] for label in scenario.labels
    }
    means = {label: [one.mean if one else None for one in each] for label, each in found.items()}
    defined = [any(value is not None for value in site) for site in zip(*means.values(), strict=True)]
    rows = []
    for label, each in found.items():
        row = [label, *(_mean_cell(one, scenario.repeats) for one in each)]
        if not scenario.has_levels:  # of the same sites for all methods, or not at all
            values = [value for value, known in zip(means[label], defined, strict=True) if known]
            row.append(number(None if None in values else mean(values)))
        rows.append(row)
    told = "In brackets: positive test images of one repeat; behind a value: from how many of the repeats it comes."
    return html.table(header, rows, f"{caption}. {told}")


def _mean_cell(summary: Summary | None, repeats: int) -> str:
    """repeats: the most that any method has."""
    if summary is None:
        return "no run"
    if summary.mean is None:
        return f"{NOT_DEFINED} (n = {summary.n}, {summary.n_positive} positive)"
    spread = "" if summary.sd is None else f" ± {summary.sd:.3f}"
    short = "" if summary.defined == repeats else f" ({summary.defined} of {repeats})"
    return f"{summary.mean:.3f}{spread}{short}"


def unseen_table(scenario: Scenario) -> str:
    level = scenario.levels[-1]
    averaged: dict[str, list[float | None]] = {}
    for one in scenario.measurements:
        if one.spec.level == level and one.model == MEAN_PROBABILITY:
            averaged.setdefault(one.spec.label, []).append(one.values["auc"])
    rows = []
    for label in scenario.labels:
        summary = scenario.summaries.get((level, UNSEEN, label))
        if summary is not None:
            pooled = summary.pooled
            words = with_interval(pooled.estimate, pooled.low, pooled.high)
            counts = f"{summary.n} ({summary.n_positive})"
            cell = _mean_cell(summary, scenario.repeats)
            rows.append([label, counts, cell, words, number(mean(averaged.get(label, [])))])
    header = [
        "method",
        "cases, all repeats (positive)",
        "mean ± sd",
        "pooled (95 % interval)",
        "of averaged probability",
    ]
    caption = (
        f"AUC on the unseen images{scenario.at_level(level)}. Methods without a global model: mean over the sites' own "
        "models; last column: the AUC of their averaged probability."
    )
    return html.table(header, rows, caption)


def metric_table(scenario: Scenario, summaries: Iterable[Summary]) -> str:
    """Every metric pooled over the repeats; only its place where it would be too long for a page."""
    by_place: dict[tuple[str, str, str], dict[str, Summary]] = {}
    for one in summaries:
        if one.scenario == scenario.name:
            by_place.setdefault((one.level, one.site, one.label), {})[one.metric] = one
    if len(by_place) > MOST_ROWS:
        return html.paragraph("Accuracy, recall and precision, pooled AUC and redraw rates: tables/summary.csv.")
    rows = []
    for (level, site, label), found in by_place.items():
        area, place = found["auc"], site if level == NO_LEVEL else f"{level} {site}"
        auc = with_interval(area.pooled.estimate, area.pooled.low, area.pooled.high)
        auc = NOT_DEFINED if area.pooled.estimate is None else auc
        others = [number(found[name].pooled.estimate) for name in ("accuracy", "recall", "precision")]
        redrawn = f"{100 * area.pooled.redraw_rate:.2f} %"
        rows.append([place, label, str(area.n), str(area.n_positive), auc, *others, redrawn])
    header = ["site", "method", "n", "positive", "AUC (95 % interval)", "accuracy", "recall", "precision", "redrawn"]
    caption = (
        "All repeats pooled: n counts an image once for every repeat that tested it. Redrawn: share of bootstrap "
        "resamples that lacked a class and were drawn again."
    )
    return html.table(header, rows, caption, names=2)


def comparison_table(comparisons: Comparisons) -> str:
    """AUC pairs, with the p of the resampled images and patients beside the paper's."""
    found: dict[tuple[str, str, str, str], dict[str, Pair]] = {}
    for pair in comparisons.pairs:
        if pair.metric == "auc":
            found.setdefault((pair.scenario, pair.level, pair.site, pair.label), {})[pair.unit] = pair
    rows = []
    for (scenario, level, site, label), units in found.items():
        pair = units["case"]
        c = pair.comparison
        place = scenario if level == NO_LEVEL else f"{scenario} {level}"
        counts = [str(len(pair.repeats)), f"{c.n} ({c.n_positive})"]
        rows.append([place, site, label, *counts, number(c.estimate_a), number(c.estimate_b), _difference(c), _p(c)])
        rows[-1] += [_p(units[unit].comparison) if unit in units else ABSENT for unit in ("image", "patient")]
    header = ["scenario", "site", "method", "repeats", "n (positive)", "AUC of reference", "AUC of method"]
    header += ["difference (95 % interval)", "p", "p by image", "p by patient"]
    unknown = found and not any("patient" in units for units in found.values())
    return html.table(header, rows, "p by patient: no patients are known." if unknown else "", names=3)


def _difference(c: Comparison) -> str:
    if c.difference is None:
        return NOT_DEFINED
    return f"{c.difference:+.3f} ({c.ci_low:+.3f} to {c.ci_high:+.3f})"


def _p(c: Comparison) -> str:
    return ABSENT if c.p is None else f"{c.p:.3f}"


def repeat_table(found: Sequence[OverRepeats]) -> str:
    """Every method against its reference over the repeats, measure by measure."""
    rows = []
    for one in found:
        if one.mean is None:
            continue
        spread = ABSENT if one.sd is None else f"{one.mean:.3f} ± {one.sd:.3f}"
        row = [one.scenario if one.level == NO_LEVEL else f"{one.scenario} {one.level}", MEASURES[one.measure]]
        row += [one.label, str(len(one.values)), spread]
        test = one.test
        if test is None:
            row += [ABSENT, ABSENT]
        else:
            row += [f"{test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f})", f"{test.p:.3f}"]
        rows.append(row)
    header = ["scenario", "measure", "method", "repeats", "mean ± sd", "reference minus it (95 % interval)", "p"]
    return html.table(header, rows, names=3)


def cost_table(outcomes: Iterable[AnyOutcome]) -> str:
    runs: dict[str, list[dict[str, Any]]] = {}
    for one in outcomes:
        runs.setdefault(one.label, []).append(one.cost)
    rows = []
    for label, costs in runs.items():
        seconds = sum(c["seconds"] for c in costs)
        sent = sum(c["bytes_per_site_round"] for c in costs) / len(costs) / 2**20
        peak = max(c["peak_memory_bytes"] for c in costs) / 2**30
        engines = ", ".join(sorted({c["engine"] for c in costs}))
        figures = [f"{seconds / 3600:.2f}", f"{seconds / len(costs):.0f}", f"{sent:.1f}", f"{peak:.2f}"]
        rows.append([label, str(len(costs)), *figures, engines])
    header = ["method", "runs", "hours in all", "seconds per run", "MiB per site and round", "peak memory (GiB)"]
    return html.table([*header, "engine"], rows, "Peak memory: the highest of all runs of the method.")


def map_table(numbers: Sequence[MapNumbers]) -> str:
    header = ["method", "weights", "sites", "images per site", "site guessed", "chance", "MMD²"]
    rows = [
        [
            one.label,
            one.stage,
            one.sites,
            one.points,
            number(one.site_accuracy),
            number(one.chance),
            number(one.mmd2, 4),
        ]
        for one in numbers
    ]
    return html.table(header, rows, "How far apart the sites lie in encoder 1's output.", 2)


def method_rows(outcomes: Iterable[AnyOutcome]) -> Rows:
    """One row per label of the study."""
    rows = []
    for label, outcome in {one.label: one for one in outcomes}.items():
        try:
            chosen = outcome.spec.settings  # a setting can change what the method is called
            method = make_method(outcome.spec.method, chosen.get("method"), chosen.get("training"))
            facts = [method.title, method.status, method.citation, "each site's own" if method.personal else "one"]
        except UserError:
            facts = ["not known to this version of heterosync", "unknown", "", ""]
        rows.append([label, *facts])
    return ["label", "method", "status", "source", "model under test"], rows


def setting_rows(info: Mapping[str, Any], outcomes: Sequence[AnyOutcome]) -> Rows:
    """What all runs share, and what differs, with the number of runs. info: study.json."""
    rows = [[f"version of {name}, at planning", str(v)] for name, v in (info.get("versions") or {}).items()]
    rows.append(["seed of each repeat", ", ".join(_seeds(outcomes))])
    for name in sorted({name for one in outcomes for name in one.info.get("versions") or {}}):
        rows.append(
            [
                f"version of {name}, in the runs",
                _told((one.info.get("versions") or {}).get(name) for one in outcomes),
            ]
        )
    for name in ("initial_weights", "engine"):
        if any(name in one.info for one in outcomes):
            rows.append([name.replace("_", " "), _told(one.info.get(name) for one in outcomes)])
    rows += _anchor_rows(outcomes)
    trainings = [one.info.get("training") or {} for one in outcomes]
    for name in sorted({name for training in trainings for name in training} - {"seed"}):
        rows.append([f"training setting {name}", _told(training.get(name) for training in trainings)])
    return ["what", "value"], rows


def _anchor_rows(outcomes: Iterable[AnyOutcome]) -> list[list[str]]:
    """One row per anchor digest and the repeats that have it; runs without the anchor task have none."""
    repeats: dict[str, set[int]] = {}
    for one in outcomes:
        if one.info.get("anchor_digest"):
            repeats.setdefault(str(one.info["anchor_digest"]), set()).add(one.spec.repeat)
    if len(repeats) < 2:
        return [["anchor digest", digest] for digest in repeats]
    anew = len(set().union(*repeats.values())) > 1 and all(len(of) == 1 for of in repeats.values())
    what = "anchor digest (drawn anew for each repeat)" if anew else "anchor digest"
    found = sorted((sorted(of), digest) for digest, of in repeats.items())
    return [[f"{what}, {', '.join(f'r{repeat}' for repeat in of)}", digest] for of, digest in found]


def _seeds(outcomes: Iterable[AnyOutcome]) -> list[str]:
    seeds = {(one.spec.repeat, str((one.info.get("training") or {}).get("seed", "unknown"))) for one in outcomes}
    return [f"r{repeat}: {seed}" for repeat, seed in sorted(seeds)]


def _told(values: Iterable[object], most: int = 6) -> str:
    """One value, or the different ones with how many runs have them."""
    counts = Counter("not recorded" if value is None else str(value) for value in values)
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{value} ({count} run{'s' if count > 1 else ''})" for value, count in counts.most_common(most)]
    return "; ".join(shown) + (f"; and {len(counts) - most} more" if len(counts) > most else "")
