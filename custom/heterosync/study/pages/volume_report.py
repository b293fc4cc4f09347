"""The report on a study on volumes: every model on every test set, as Sarma et al., JAMIA 2021, in one page."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from heterosync.errors import UserError, nearest
from heterosync.files import make_folder, own_folder, write_text
from heterosync.study.evidence.cross_site import (
    SIGNIFICANT,
    PairedTest,
    cross_site_rows,
    published_rows,
    sets_of,
    summarise_sets,
    tests_of,
)
from heterosync.study.evidence.volume_outcomes import CrossValidation, VolumeStudy, read_volume_study
from heterosync.study.evidence.volume_tables import volume_tables
from heterosync.study.figures import boxes, curves, overlay
from heterosync.study.layout import REPORT
from heterosync.study.pages import html
from heterosync.study.pages.drawings import Drawn, cost_figure, mean_over_sites
from heterosync.study.pages.page_tables import cost_table, method_rows, setting_rows
from heterosync.study.pages.study_report import is_synthetic, method_section, setting_section
from heterosync.study.pages.volume_page_tables import fold_table, measure_table, test_table
from heterosync.study.pages.wish import COMMAND, FIGURES, MARK, PAGE, TABLES, Made, Wish
from heterosync.study.table import csv_table, text_table
from heterosync.training import SEGMENTATION

PUBLISHED_TITLE = "As published: Sarma et al., JAMIA 28(6), 2021, Tables 3 and 4"


@dataclass(frozen=True, eq=False)
class VolumeResults:
    """A study with what is computed of it. reference: the model that all others are compared with, None where no
    ensemble is finished."""

    study: VolumeStudy
    reference: str | None

    @cached_property
    def tests(self) -> dict[tuple[str, int], dict[str, dict[str, PairedTest]]]:
        """(scenario, repeat) -> test set -> model -> t-test against the reference."""
        reference = str(self.reference)
        return {(one.scenario, one.repeat): tests_of(one.scores, reference, one.challenge) for one in self.told}

    def cross_site(self, validation: CrossValidation) -> tuple[list[str], list[list[str]]]:
        return cross_site_rows(validation.scores, str(self.reference), validation.challenge)

    @property
    def told(self) -> list[CrossValidation]:
        """Those with the reference's ensemble."""
        return [one for one in self.study.validations if any(s.model == self.reference for s in one.scores)]

    @property
    def problems(self) -> list[str]:
        """All that is missing; paths are below the study's folder, since a report travels."""
        lines = list(self.study.problems)
        for one in self.study.validations:
            if one not in self.told:
                what = f"the ensemble of {self.reference}" if self.reference else "any ensemble"
                lines.append(f"{one.name}: no cross-site table yet, {what} is missing")
        return [line.replace(f"{self.study.folder}/", "") for line in lines]


def make_report(folder: Path, wish: Wish, say: Callable[[str], None]) -> Made:
    """The whole report. Raises `UserError` when the folder is no study's, when no run has been finished, for an unknown
    reference, and for wishes that have no meaning here."""
    if wish.resamples is not None:
        raise UserError("models on volumes are compared by t-tests, which resample nothing: leave out --resamples")
    if not wish.maps:
        raise UserError("a report on volumes has no maps: leave out --no-maps")
    say("reading the runs")
    results = volume_results(folder, wish.reference)
    files = write_volume_report(results, wish.out)
    text, facts = report_text(results), report_dict(results)
    facts["shows_patients"] = not is_synthetic(results.study.info) and any("_overlays." in one.name for one in files)
    return Made(f"{text}\n\n{overlay.PATIENTS}" if facts["shows_patients"] else text, facts, files[-1])


def volume_results(folder: Path | str, reference: str | None = None) -> VolumeResults:
    """Read a study. reference: a model; None: the first one in the plan that all sites share, else the first."""
    study = read_volume_study(folder)
    if not study.outcomes:
        why = f": {study.problems[0]}" if study.problems else ""
        raise UserError(f"{folder} has no finished run to report on{why}")
    models = list(dict.fromkeys(score.model for one in study.validations for score in one.scores))
    if reference is not None and reference not in models:
        told = nearest(reference, models) if models else "no ensemble is finished"
        raise UserError(f"{folder} has no finished ensemble of '{reference}': {told}")
    shared = [one.label for one in study.outcomes if not one.personal and one.label in models]
    return VolumeResults(study, reference or next(iter([*shared, *models]), None))


def report_text(results: VolumeResults) -> str:
    """What a terminal shows of a report."""
    study = results.study
    lines = [f"{len(study.outcomes)} of {len(study.info['runs'])} runs are finished and readable"]
    lines += [f"  {line}" for line in results.problems]
    for one in results.told:
        lines += ["", f"{one.name}: {_TABLE}", "", text_table(*results.cross_site(one))]
    return "\n".join([*lines, "", f"{PUBLISHED_TITLE}:", "", text_table(*published_rows())])


def report_dict(results: VolumeResults) -> dict[str, Any]:
    """The report for a program."""
    study = results.study
    return {
        "folder": str(study.folder),
        "runs_finished": len(study.outcomes),
        "runs_planned": len(study.info["runs"]),
        "problems": results.problems,
        "reference": results.reference,
        "cross_site": [
            {"scenario": one.scenario, "repeat": one.repeat, **asdict(found)}
            for one in study.validations
            for found in summarise_sets(one.scores, one.challenge)
        ],
        "tests": [
            {"scenario": scenario, "repeat": repeat, "site": site, "model": model, **test.to_dict()}
            for (scenario, repeat), sets in results.tests.items()
            for site, models in sets.items()
            for model, test in models.items()
        ],
    }


def write_volume_report(results: VolumeResults, out: Path | str | None = None) -> list[Path]:
    """Write index.html, figures/ and tables/ into `out` (default: report/ in the study's folder), in place of an
    earlier report there; the page is written last. Returns the files. Raises `UserError` when `out` holds other
    files."""
    study = results.study
    out = own_folder(study.folder / REPORT if out is None else out, MARK, COMMAND)
    figures = make_folder(out / FIGURES)
    submodels = [one for validation in study.validations for one in validation.submodels]
    texts = volume_tables(study, results.tests, results.reference)
    texts |= {
        "methods.csv": csv_table(*method_rows(study.outcomes)),
        "settings.csv": csv_table(*setting_rows(study.info, submodels)),
        "missing.csv": csv_table(["problem"], [[line] for line in results.problems]),
    }
    files = [write_text(out / TABLES / name, text) for name, text in texts.items()]
    sections = []
    for validation in study.validations:
        section, drawn = _section(validation, results, figures)
        sections.append(section)
        files += drawn
    cost = cost_figure(study.outcomes, figures, results.reference or "")
    files += cost.files
    told = html.paragraph("Runs of a method: its submodels, and the ensemble's tests at every site.")
    sections += [
        html.Section("Cost", [told, html.figure(cost.svg, cost.caption), cost_table(study.outcomes)]),
        method_section(study.outcomes),
        setting_section(study.info, submodels),
    ]
    title = f"Study on volumes {study.info.get('name') or ''}".strip()
    files.append(write_text(out / PAGE, html.page(title, _lead(results), sections)))
    return files


_TABLE = "mean ± standard deviation of Dice over the test cases; *: lower than the reference, p < .001"


def _lead(results: VolumeResults) -> list[str]:
    study = results.study
    done, planned, digest = len(study.outcomes), len(study.info["runs"]), study.info.get("digest", "unknown")
    parts = [html.paragraph(f"{done} of {planned} runs are finished and readable. Plan digest: {digest}.")]
    if is_synthetic(study.info):
        line = "The volumes of this study are synthetic: drawn by a program. Its numbers say nothing about patients."
        parts.append(html.note(line))
    if results.problems:
        parts.append(html.note("Missing, damaged or left out; the report goes on without it:", results.problems))
    parts.append(
        html.paragraph(
            "Every model is an ensemble: the mean of the probabilities of one submodel per fold, each chosen by its "
            "validation Dice on that fold. A private model has seen one site alone. All are tested on the held-out "
            "cases of every site, and on the challenge set (unseen), which no site trains with."
        )
    )
    return parts


def _section(validation: CrossValidation, results: VolumeResults, folder: Path) -> tuple[html.Section, list[Path]]:
    section, files = html.Section(f"Cross-validation {validation.name}"), list[Path]()
    if validation in results.told:
        reference = str(results.reference)
        header, rows = results.cross_site(validation)
        caption = (
            f"Mean ± standard deviation of Dice over the test cases. *: significantly lower than {reference} "
            f"(p < {SIGNIFICANT}, two-sided paired t-test; tested overall and on the challenge set, as in the paper)."
        )
        section.parts += [html.heading("Every model on every test set"), html.table(header, rows, caption)]
        header, rows = published_rows()
        caption = (
            f"{PUBLISHED_TITLE}: patients of three hospitals, ProstateX as the challenge set. Other data than above: "
            "compare the pattern, not the numbers."
        )
        section.parts.append(html.table(header, rows, caption))
        drawn = _boxes(validation, folder, reference)
        files += drawn.files
        section.parts += [html.figure(drawn.svg, drawn.caption), measure_table(validation)]
        seen = _overlays(validation, folder, reference)
        if seen:
            files += seen.files
            section.parts.append(html.heading(f"Test cases as {reference} segments them"))
            section.parts += [] if is_synthetic(results.study.info) else [html.note(overlay.PATIENTS)]
            section.parts.append(html.figure(seen.svg, seen.caption))
        tests = results.tests[validation.scenario, validation.repeat]
        section.parts += [html.heading("Paired t-tests"), test_table(tests, reference)]
    if validation.submodels:
        section.parts += [html.heading("Submodels"), fold_table(validation)]
        curve = _convergence(validation, folder, results.reference)
        if curve:
            files += curve.files
            section.parts.append(html.figure(curve.svg, curve.caption))
    return section, files


def _boxes(validation: CrossValidation, folder: Path, reference: str) -> Drawn:
    sets = sets_of(validation.scores, validation.challenge)
    series: dict[str, dict[str, list[float | None]]] = {}
    for site, scores in sets.items():
        for score in scores:
            series.setdefault(site, {}).setdefault(score.model, []).append(score.dice)
    notes = {site: f"test cases: {max(map(len, models.values()))}" for site, models in series.items()}
    shown, stem = SEGMENTATION.shown, folder / f"{validation.scenario}_r{validation.repeat}_dice"
    files = boxes.boxes(series, stem, f"{shown} of a test case", notes, reference, SEGMENTATION.chance, counted=False)
    caption = f"{shown} of every test case: median, quartiles, whiskers to minimum and maximum, every case a point."
    return Drawn(files, caption)


def _overlays(validation: CrossValidation, folder: Path, reference: str) -> Drawn | None:
    views = [view for one in validation.ensembles for view in one.views(reference)]
    if not views:  # a study that was carried out elsewhere, without its slices
        return None
    files = overlay.overlays(views, folder / f"{validation.scenario}_r{validation.repeat}_overlays")
    return Drawn(files, overlay.CAPTION)


def _convergence(validation: CrossValidation, folder: Path, reference: str | None) -> Drawn | None:
    rounds: dict[str, dict[int, list[float]]] = {}
    for one in validation.submodels:
        for round_, value in mean_over_sites(one).items():
            rounds.setdefault(one.label, {}).setdefault(round_, []).append(value)
    if not rounds:
        return None
    series: Mapping[str, Mapping[str, Mapping[int, list[float]]]] = {validation.name: rounds}
    stem = folder / f"{validation.scenario}_r{validation.repeat}_convergence"
    words = f"validation {SEGMENTATION.shown}, mean over sites"
    files = curves.convergence(series, stem, words, reference, SEGMENTATION.chance)
    caption = (
        f"Validation {SEGMENTATION.shown} of the model with which a site begins a round, mean over the sites; line: "
        "mean over the folds, band: minimum to maximum."
    )
    return Drawn(files, caption)
