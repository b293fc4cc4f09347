"""The report on a study: one self-contained page, its figures as PNG and SVG, its numbers as CSV."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from heterosync.errors import UserError, nearest
from heterosync.files import make_folder, own_folder, write_text
from heterosync.study.evidence.bootstrap import RESAMPLES
from heterosync.study.evidence.comparisons import REFERENCE, Comparisons, compare
from heterosync.study.evidence.measures import Measurement, Summary, measurements, summaries
from heterosync.study.evidence.outcomes import AnyOutcome, Study, read_study
from heterosync.study.evidence.repeats import OverRepeats, over_anchors, over_repeats
from heterosync.study.evidence.tables import repeats_csv, write_tables
from heterosync.study.layout import NO_LEVEL, REPORT
from heterosync.study.pages import html
from heterosync.study.pages.by_scenario import Scenario, scenarios_of
from heterosync.study.pages.drawings import cost_figure, scenario_figures
from heterosync.study.pages.maps import MapNumbers, embedding_figure
from heterosync.study.pages.page_tables import (
    auc_tables,
    comparison_table,
    cost_table,
    map_table,
    method_rows,
    metric_table,
    repeat_table,
    setting_rows,
    unseen_table,
)
from heterosync.study.pages.wish import COMMAND, FIGURES, MARK, PAGE, TABLES, Made, Wish
from heterosync.study.running.plan import SYNTHETIC
from heterosync.study.table import csv_table, text_table, with_interval


@dataclass(frozen=True, eq=False)
class Results:
    """A study with everything computed of it; comparisons: None where there is only one method."""

    study: Study
    measurements: list[Measurement]
    summaries: list[Summary]
    comparisons: Comparisons | None
    repeats: list[OverRepeats]
    anchors: list[OverRepeats]
    reference: str
    resamples: int

    @property
    def problems(self) -> list[str]:
        """All that is missing or was left out; paths are below the study's folder, since a report travels."""
        lines = [*self.study.problems, *(self.comparisons.problems if self.comparisons else [])]
        return [line.replace(f"{self.study.folder}/", "") for line in lines]


def make_report(folder: Path, wish: Wish, say: Callable[[str], None]) -> Made:
    """The whole report on a study on pictures. Raises as `study_results` and `write_study_report` do."""
    say("reading the runs and resampling their test cases")
    results = study_results(folder, wish.reference, wish.resamples or RESAMPLES)
    files = write_study_report(results, wish.out, wish.maps, say)
    return Made(report_text(results), study_dict(results), files[-1])


def study_results(
    folder: Path | str, reference: str | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Results:
    """Read a study and compute its statistics. reference: the label that all others are compared with (None: `hsl`
    where it is there, else the first).

    Raises `UserError` when the folder is no study's, when no run has been finished, or for an unknown `reference`.
    """
    study = read_study(folder)
    labels = list(dict.fromkeys(one.spec.label for one in study.outcomes))
    if not labels:
        why = f": {study.problems[0]}" if study.problems else ""
        raise UserError(f"{folder} has no finished run to report on{why}")
    if reference is not None and reference not in labels:
        raise UserError(f"{folder} has no finished run of '{reference}': {nearest(reference, labels)}")
    chosen = reference or (REFERENCE if REFERENCE in labels else labels[0])
    compared = compare(study, chosen, resamples=resamples, seed=seed) if len(labels) > 1 else None
    summed = summaries(study, resamples=resamples, seed=seed)
    repeats, anchors = over_repeats(study, chosen), over_anchors(study)
    return Results(study, measurements(study), summed, compared, repeats, anchors, chosen, resamples)


def write_study_report(
    results: Results,
    out: Path | str | None = None,
    maps: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Write index.html, figures/ and tables/ into `out` (default: report/ in the study's folder), in place of an
    earlier report there; the page is written last. Returns the files.

    maps: also t-SNE maps, which take the models and the images; say: told what is being done. Raises `UserError` when
    `out` holds other files.
    """
    out = own_folder(results.study.folder / REPORT if out is None else out, MARK, COMMAND)
    figures = make_folder(out / FIGURES)
    files = write_tables(results.study, results.measurements, results.summaries, results.comparisons, out / TABLES)
    sections, numbers = [], []
    for scenario in scenarios_of(results.study, results.measurements, results.summaries, results.reference):
        say(f"drawing scenario {scenario.name}")
        section, written, of_maps = _scenario_section(scenario, results, figures, maps)
        sections.append(section)
        numbers += of_maps
        files += written
    cost = cost_figure(results.study.outcomes, figures, results.reference)
    files += cost.files
    sections += [
        _comparison_section(results),
        _repeat_section(results),
        html.Section("Cost", [html.figure(cost.svg, cost.caption), cost_table(results.study.outcomes)]),
        method_section(results.study.outcomes),
        setting_section(results.study.info, results.study.outcomes),
    ]
    files += _more_tables(results, numbers, out / TABLES)
    title = f"Heterogeneity study {results.study.info.get('name') or results.study.plan.get('name') or ''}".strip()
    files.append(write_text(out / PAGE, html.page(title, _lead(results), sections)))
    return files


def report_text(results: Results) -> str:
    """What a terminal shows of a report."""
    lines = [f"{len(results.study.outcomes)} of {len(results.study.info['runs'])} runs are finished and readable"]
    lines += [f"  {line}" for line in results.problems]
    rows = [
        [f"{one.scenario} {'' if one.level == NO_LEVEL else one.level}".strip(), one.site, one.label]
        + [f"{one.n} ({one.n_positive})", with_interval(one.pooled.estimate, one.pooled.low, one.pooled.high)]
        for one in results.summaries
        if one.metric == "auc"
    ]
    header = ["scenario", "site", "method", "test images (positive)", "AUC of all repeats (95 % interval)"]
    lines += ["", text_table(header, rows)]
    return "\n".join(lines + (["", results.comparisons.note()] if results.comparisons else []))


def study_dict(results: Results) -> dict[str, Any]:
    """The report for a program."""
    return {
        "folder": str(results.study.folder),
        "runs_finished": len(results.study.outcomes),
        "runs_planned": len(results.study.info["runs"]),
        "problems": results.problems,
        "reference": results.reference,
        "summaries": [asdict(one) for one in results.summaries],
        "comparisons": [asdict(one) for one in results.comparisons.pairs] if results.comparisons else [],
        "over_repeats": [asdict(one) | {"test": one.test and one.test.to_dict()} for one in results.repeats],
        "over_anchors": [asdict(one) | {"test": one.test and one.test.to_dict()} for one in results.anchors],
        "pairs_tested": results.comparisons.tested() if results.comparisons else 0,
    }


def is_synthetic(info: Mapping[str, Any]) -> bool:
    """info: study.json."""
    return info.get("source") == SYNTHETIC


def _lead(results: Results) -> list[str]:
    study = results.study
    done, planned = len(study.outcomes), len(study.info["runs"])
    parts = [
        html.paragraph(
            f"{done} of {planned} runs are finished and readable. Plan digest: {study.info.get('digest', 'unknown')}."
        )
    ]
    if is_synthetic(study.info):
        parts.append(
            html.note(
                "The images of this study are synthetic: they were drawn by a program. Its numbers show how the "
                "methods behave under this skew of made-up data, and say nothing about patients."
            )
        )
    if results.problems:
        parts.append(html.note("Missing, damaged or left out; the report goes on without it:", results.problems))
    parts.append(
        html.paragraph(
            "Every test image of a site is scored once per repeat by the model that speaks for the run: the fusion "
            "with the best validation score, or for personal methods each site's own model. AUC needs both classes; "
            "where a test set lacks one it is printed as not defined and enters no mean. Beside every AUC stands how "
            "many test images are positive: with few of them it rests on those few. Accuracy, recall and precision "
            "are taken at the threshold 0.5; precision without a positive prediction counts as 0."
        )
    )
    parts.append(
        html.paragraph(
            "Pooled: the scores of all repeats ranked together. That sets scores by the models of different repeats "
            "against each other, so the pooled AUC may lie below the mean over the repeats. To quote, as in the paper: "
            "the pooled value with its interval and p. The mean ± standard deviation tells how the repeats differ."
        )
    )
    return parts


def _scenario_section(
    scenario: Scenario, results: Results, figures: Path, maps: bool
) -> tuple[html.Section, list[Path], list[MapNumbers]]:
    drawn = scenario_figures(scenario, figures, results.resamples)
    numbers: list[MapNumbers] = []
    problems: list[str] = []
    if maps:
        tsne, numbers, problems = embedding_figure(scenario, figures)
        drawn += [tsne] if tsne else []
    section = html.Section(f"Scenario {scenario.name}", [html.figure(each.svg, each.caption) for each in drawn[:2]])
    section.parts += auc_tables(scenario)
    section.parts += [html.figure(each.svg, each.caption) for each in drawn[2:]]
    if scenario.has_unseen:
        section.parts.append(unseen_table(scenario))
    if numbers:
        section.parts.append(map_table(numbers))
    if problems:
        section.parts.append(html.note("Not shown:", problems))
    section.parts.append(metric_table(scenario, results.summaries))
    return section, [path for each in drawn for path in each.files], numbers


def _comparison_section(results: Results) -> html.Section:
    section = html.Section("Differences between methods")
    found = results.comparisons
    if found is None:
        section.parts.append(html.paragraph("There is only one method: nothing to compare."))
        return section
    section.parts += [
        html.paragraph(
            f"AUC of {results.reference} minus AUC of the other method, on the test cases that both scored in the same "
            f"repeats, pooled. Interval and p: paired percentile bootstrap, {results.resamples} resamples, two-tailed. "
            "A p of 0 means that none of the resamples reversed the difference. The repeats share images, and patients "
            "may have several: the last two columns resample whole images and whole patients, and decide where they "
            "disagree with the first."
        ),
        html.note(found.note()),
        comparison_table(found),
        html.paragraph(f"All metrics, smoothed p values and redraw rates: {TABLES}/comparisons.csv."),
    ]
    return section


def _repeat_section(results: Results) -> html.Section:
    text = (
        f"Each repeat is one number: it has a draw of images, splits and first weights of its own. {results.reference} "
        "minus the other method over the repeats that both have, with the 95 % interval and the p of a two-sided "
        "paired t-test. This asks whether the difference would come again in another repeat with these images; the "
        "bootstrap above asks whether it would with other test images. With three repeats or so only large differences "
        f"can show. p values are not corrected for the number of rows. As numbers: {TABLES}/repeats.csv."
    )
    parts = [html.paragraph(text), repeat_table(results.repeats)]
    if results.anchors:
        text = (
            "Every method with another anchor task: the scenario that differs in nothing else, minus this one, over "
            f"the same repeats. As numbers: {TABLES}/anchors.csv."
        )
        parts += [html.paragraph(text), repeat_table(results.anchors)]
    return html.Section("Over the repeats", parts)


def method_section(outcomes: Iterable[AnyOutcome]) -> html.Section:
    header, rows = method_rows(outcomes)
    text = (
        "Status with respect to the source. Exact: as published. Corrected: a defect of the published code is mended. "
        "Code-faithful: as the official code, where paper and code differ. Reconstruction: the source leaves something "
        "open that had to be filled in; a weak result may then be the reconstruction's, not the method's."
    )
    return html.Section("Methods", [html.paragraph(text), html.table(header, rows, names=None)])


def setting_section(info: Mapping[str, Any], outcomes: Sequence[AnyOutcome]) -> html.Section:
    header, rows = setting_rows(info, outcomes)
    return html.Section("Versions, seeds and settings", [html.table(header, rows, names=None)])


def _more_tables(results: Results, numbers: Sequence[MapNumbers], folder: Path) -> list[Path]:
    """repeats.csv, methods.csv, settings.csv, missing.csv and, where there is something, anchors.csv and maps.csv."""
    texts = {
        "repeats.csv": repeats_csv(results.repeats),
        "methods.csv": csv_table(*method_rows(results.study.outcomes)),
        "settings.csv": csv_table(*setting_rows(results.study.info, results.study.outcomes)),
        "missing.csv": csv_table(["problem"], [[line] for line in results.problems]),
    }
    if results.anchors:
        texts["anchors.csv"] = repeats_csv(results.anchors)
    if numbers:
        texts["maps.csv"] = csv_table([item.name for item in fields(MapNumbers)], [astuple(one) for one in numbers])
    return [write_text(folder / name, text) for name, text in texts.items()]
