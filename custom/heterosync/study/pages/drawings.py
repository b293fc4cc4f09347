"""The figures of a study, scenario by scenario: which numbers go into which figure, and what must be said beside it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from heterosync.study.evidence.outcomes import AnyOutcome, models_at
from heterosync.study.evidence.runs import task_of
from heterosync.study.evidence.statistics import RocBand, common_cases, roc_band
from heterosync.study.figures import bars, boxes, cost, curves, lines, roc, violins
from heterosync.study.layout import UNSEEN
from heterosync.study.pages.by_scenario import MOST_PARTS, Scenario, image_counts
from heterosync.study.table import mean, with_interval

#: Diagnostics of the two-task network (models/mechanism.py) and what they are, in the order of the figure.
COUPLING = {
    "primary_gradient": "gradient norm of the primary task at encoder 1",
    "anchor_gradient": "gradient norm of the anchor task at encoder 1",
    "anchor_gradient_ratio": "anchor gradient / primary gradient",
    "partner_effect": "change of the probability by another partner image",
    "mixture_share": "share of the mixture in tower 1's input",
}


@dataclass(frozen=True)
class Drawn:
    """A figure: its files (PNG, SVG) and what stands below it."""

    files: list[Path]
    caption: str

    @property
    def svg(self) -> Path:
        return next(path for path in self.files if path.suffix == ".svg")


def scenario_figures(scenario: Scenario, folder: Path, resamples: int) -> list[Drawn]:
    """All figures of a scenario but the t-SNE maps, which need models and images."""
    found = [_data(scenario, folder), _scores(scenario, folder)]
    if scenario.has_unseen:
        found += [_rocs(scenario, folder, resamples), _unseen(scenario, folder)]
    return [drawn for drawn in [*found, _convergence(scenario, folder), _coupling(scenario, folder)] if drawn]


def cost_figure(outcomes: Iterable[AnyOutcome], folder: Path, reference: str) -> Drawn:
    costs: dict[str, dict[str, list[float]]] = {}
    for one in outcomes:
        for name, value in (
            ("minutes per run", one.cost["seconds"] / 60),
            ("MiB per site and round", one.cost["bytes_per_site_round"] / 2**20),
            ("peak memory of a run (GiB)", one.cost["peak_memory_bytes"] / 2**30),
        ):
            costs.setdefault(name, {}).setdefault(one.label, []).append(value)
    series = {name: {label: sum(v) / len(v) for label, v in found.items()} for name, found in costs.items()}
    caption = (
        "Cost per method, mean over its runs: wall time, size of what a site sends in a round, highest memory of all "
        "processes together. Times compare only between runs on one machine with the same load."
    )
    return Drawn(cost.costs(series, folder / "cost", reference), caption)


def _data(scenario: Scenario, folder: Path) -> Drawn:
    counts, whole = image_counts(scenario)
    what = "images (training, validation, test)" if whole else "test images"
    series = {level if scenario.has_levels else "": sites for level, sites in counts.items()}
    files = bars.distribution(series, folder / f"{scenario.name}_data", what)
    told = "" if whole else " The site folders of this study are not here any more: only test images are counted."
    return Drawn(files, f"Data of scenario {scenario.name}, first repeat: length = images, colour = positives.{told}")


def _scores(scenario: Scenario, folder: Path) -> Drawn:
    return _level_lines(scenario, folder) if scenario.has_levels else _boxes(scenario, folder)


def _boxes(scenario: Scenario, folder: Path) -> Drawn:
    level = scenario.levels[0]
    series = {
        site: {
            label: values for label in scenario.labels if (values := scenario.values(level, site, label)) is not None
        }
        for site in scenario.sites
    }
    notes = {site: scenario.test_images(level, site) for site in scenario.sites}
    files = boxes.boxes(series, folder / f"{scenario.name}_auc", "test AUC", notes, scenario.reference)
    caption = (
        "Test AUC per site and method over the repeats: median, quartiles, whiskers to minimum and maximum, every "
        "repeat a point. k/r at the right: the AUC is defined in k of r repeats only. Counts are those of one repeat."
    )
    return Drawn(files, caption)


def _level_lines(scenario: Scenario, folder: Path) -> Drawn:
    series = {
        site: {
            label: {level: scenario.values(level, site, label) or [] for level in scenario.levels}
            for label in scenario.labels
        }
        for site in scenario.sites
    }
    notes = {
        site: {level: f"({scenario.counts(level, site)[1]})" for level in scenario.levels} for site in scenario.sites
    }
    files = lines.level_lines(
        series, scenario.levels, folder / f"{scenario.name}_auc", "test AUC", notes, scenario.reference,
        "level (positive test images of one repeat)",
    )  # fmt: skip
    caption = (
        f"Test AUC against the level of {scenario.name}: mean over the repeats, bars from minimum to maximum. In every "
        f"row {scenario.reference} (thick) and a few other methods. A gap: the AUC is not defined there."
    )
    return Drawn(files, caption)


def _rocs(scenario: Scenario, folder: Path, resamples: int) -> Drawn:
    level = scenario.levels[-1]
    series: dict[str, dict[str, tuple[str, RocBand | None]]] = {}
    for site in scenario.sites:
        for label, runs in scenario.series[level].items():
            summary = scenario.summaries.get((level, site, label))
            if summary is None:
                continue
            (pooled,), _ = common_cases(models_at(runs, site))
            words = with_interval(summary.pooled.estimate, summary.pooled.low, summary.pooled.high)
            band = roc_band(pooled.labels, pooled.scores, resamples)
            series.setdefault(site, {})[label] = (words if band else "AUC not defined", band)
    notes = {site: scenario.test_images(level, site) for site in series}
    files = roc.rocs(series, folder / f"{scenario.name}_roc", notes, scenario.reference)
    caption = (
        f"ROC per site{scenario.at_level(level)}, repeats pooled: mean curve and 95 % band over {resamples} bootstrap "
        "resamples of the test cases; AUC of the pooled cases with its 95 % interval. Counts are those of one repeat."
    )
    return Drawn(files, caption)


def _unseen(scenario: Scenario, folder: Path) -> Drawn:
    level = scenario.levels[-1]
    series = {
        label: values for label in scenario.labels if (values := scenario.values(level, UNSEEN, label)) is not None
    }
    title = f"unseen population ({scenario.test_images(level, UNSEEN)})"
    stem = folder / f"{scenario.name}_unseen"
    files = violins.violins(series, stem, "AUC on the unseen population", title, scenario.reference)
    caption = (
        f"AUC on images that no site trained on{scenario.at_level(level)}: another population where the scenario has "
        "one, else what the sites left over of the source. Violin over the repeats, quartiles (bar), median (diamond). "
        "For methods without a global model a repeat's value is the mean over the AUCs of the sites' own models."
    )
    return Drawn(files, caption)


def _convergence(scenario: Scenario, folder: Path) -> Drawn | None:
    series: dict[str, dict[str, dict[int, list[float]]]] = {}
    for level, part in scenario.parts().items():
        for label in scenario.labels:
            rounds: dict[int, list[float]] = {}
            for one in scenario.series[level].get(label, {}).values():
                for round_, value in mean_over_sites(one).items():
                    rounds.setdefault(round_, []).append(value)
            if rounds:
                series.setdefault(part, {})[label] = rounds
    if not series:
        return None
    files = curves.convergence(series, folder / f"{scenario.name}_convergence", reference=scenario.reference)
    shown = (
        f" Shown: {', '.join(series)} of {len(scenario.levels)} levels." if len(scenario.levels) > MOST_PARTS else ""
    )
    caption = (
        "Validation AUC of the model with which a site begins a round (the last point: after the last fusion), mean "
        f"over the sites; line: mean over the repeats, band: minimum to maximum.{shown}"
    )
    return Drawn(files, caption)


def mean_over_sites(outcome: AnyOutcome) -> dict[int, float]:
    """Round -> validation score of the received model."""
    values: dict[int, list[float | None]] = {}
    received = task_of(outcome.info).received
    for round_, _, metric, value in outcome.history:
        if metric == received:
            values.setdefault(round_, []).append(value)
    return {round_: known for round_, each in sorted(values.items()) if (known := mean(each)) is not None}


def _coupling(scenario: Scenario, folder: Path) -> Drawn | None:
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for one in scenario.outcomes:
        for round_, _, metric, value in one.history:
            if metric in COUPLING or metric.startswith("grad_"):
                found.setdefault(metric, {}).setdefault(one.spec.label, {}).setdefault(round_, []).append(value)
    if not found:
        return None
    order = [*(name for name in COUPLING if name in found), *sorted(set(found) - set(COUPLING))]
    series = {COUPLING.get(name, name): found[name] for name in order}
    files = curves.coupling(series, folder / f"{scenario.name}_coupling")
    caption = (
        "How strongly the anchor task reaches the primary task: line: mean over sites and repeats, band: minimum to "
        "maximum. While the anchor's gradient at encoder 1 stays small beside the primary one, a gain of the method "
        "has to be put down to sampling, steps, parameters and averaging rather than to the anchor task."
    )
    return Drawn(files, caption)
