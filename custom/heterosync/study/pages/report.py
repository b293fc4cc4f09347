"""The report on one or more runs: text, Markdown, CSV, figures and a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heterosync.errors import UserError
from heterosync.files import make_folder, write_text
from heterosync.study.evidence.runs import Run, read_runs
from heterosync.study.evidence.views import views_of_run
from heterosync.study.figures import run as figures
from heterosync.study.figures.overlay import CAPTION, PATIENTS, overlays
from heterosync.study.pages import html
from heterosync.study.table import ABSENT, csv_table, mean, number, text_table, with_interval
from heterosync.training import Task

__all__ = ["read_runs", "report_dict", "report_text", "score_table", "summary", "write_report"]


def task_of_all(runs: Sequence[Run]) -> Task:
    """Raises `UserError` for runs of several tasks: their scores do not stand in one table."""
    by_task = {run.task.name: run for run in runs}
    if len(by_task) > 1:
        (first, one), (second, other), *_ = by_task.items()
        raise UserError(f"{one.folder} learned {first} and {other.folder} {second}: make a report on each by itself")
    return runs[0].task


def sites_of(runs: Sequence[Run]) -> list[str]:
    return sorted({site for run in runs for site in run.test_metrics})


def summary(runs: Sequence[Run]) -> dict[str, dict[str, float | None]]:
    """Run label -> site -> test score, and `mean`, the plain mean over the sites that trained (not the AUC of
    the pooled cases)."""
    metric = task_of_all(runs).metric
    return {
        run.label: {
            **{site: metrics.get(metric) for site, metrics in sorted(run.test_metrics.items())},
            "mean": mean([m.get(metric) for site, m in run.test_metrics.items() if site not in run.receivers]),
        }
        for run in runs
    }


def score_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Test scores with their 95 % intervals: one row per site, one column per run."""
    task, rows = task_of_all(runs), []
    (counted, words), shown = task.counted, (task.metric, "ci_low", "ci_high")
    for site in sites_of(runs):
        cells = [run.test_metrics.get(site, {}) for run in runs]
        known = next((m for m in cells if m.get("n") is not None), {})
        counts = f"{number(known['n'], 0)} ({number(known.get(counted), 0)})" if known else ABSENT
        rows.append([site, counts, *(with_interval(*(m.get(name) for name in shown)) for m in cells)])
    rows.append(["mean", "", *(number(values["mean"]) for values in summary(runs).values())])
    return ["site", f"test {task.items} ({words})", *(run.label for run in runs)], rows


def score_table(runs: Sequence[Run]) -> str:
    return text_table(*score_rows(runs))


def validation_table(runs: Sequence[Run]) -> str:
    """The latest validation score of each site, for runs that have not been tested yet."""
    sites = sorted({site for run in runs for site in run.validation})
    rows = [
        [site, *(number(run.validation[site][-1][1] if site in run.validation else None) for run in runs)]
        for site in sites
    ]
    rows.append(["mean", *(number(mean([points[-1][1] for points in run.validation.values()])) for run in runs)])
    return text_table(["site", *(run.label for run in runs)], rows)


def describe(run: Run) -> str:
    """What a reader must know of a run before its numbers."""
    planned = f" of {run.rounds_planned}" if run.rounds_planned is not None else ""
    seconds = run.info.get("wall_seconds", 0)
    lines = [f"{run.label}: {run.status}, {run.rounds_done}{planned} rounds in {seconds:.0f} s ({run.folder})"]
    if run.method is not None:
        lines.append(f"  {run.method.title}, {run.method.status}: {run.method.citation}")
    if run.model:
        best = run.info.get("best_round") if run.model == "best" else None
        lines.append(f"  tested model: {run.model}" + (f", after {best} rounds" if best is not None else ""))
    if run.absent:
        lines.append("  " + "; ".join(run.absent))
    lines += [f"  refused, {line}" for line in run.refused]
    return "\n".join(lines)


def report_text(runs: Sequence[Run]) -> str:
    """The whole report as text that is also Markdown."""
    task, parts = task_of_all(runs), ["\n".join(describe(run) for run in runs)]
    tested = [run for run in runs if run.test_metrics]
    untested = [run for run in runs if not run.test_metrics and run.validation]
    if tested:
        head = f"Test {task.shown} (95 % interval), all test {task.items} scored once"
        parts.append(f"{head}:\n\n{score_table(tested)}")
    if untested:
        head = f"Not tested yet; validation {task.shown} of the latest global model"
        parts.append(f"{head}:\n\n{validation_table(untested)}")
    if not tested and not untested:
        parts.append("No result yet: the first round has not ended.")
    return "\n\n".join(parts)


def report_dict(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The report for a program: one object per run."""
    return [
        {
            "label": run.label,
            "folder": str(run.folder),
            "status": run.status,
            "method_status": run.method.status if run.method is not None else None,
            "rounds_done": run.rounds_done,
            "rounds_planned": run.rounds_planned,
            "tested_model": run.model,
            run.task.metric: summary([run])[run.label],
            "tests": run.tests,
            "validation": run.validation,
            "absent": run.absent,
            "refused": run.refused,
        }
        for run in runs
    ]


def write_report(runs: Sequence[Run], out: Path | str) -> list[Path]:
    """Write report.md, auc.csv or dice.csv (one row per run, model and site), the figures that have something to show,
    and a page with all of them, index.html. Raises `UserError` for runs of several tasks."""
    task, text = task_of_all(runs), report_text(runs)
    out = make_folder(out)
    rows = [
        [run.label, model, site, *(metrics.get(key, "") for key in task.reported)]
        for run in runs
        for model, sites in run.tests.items()
        for site, metrics in sites.items()
    ]
    files = [
        write_text(out / "report.md", f"# Report\n\n{text}\n"),
        write_text(out / f"{task.metric}.csv", csv_table(["run", "model", "site", *task.reported], rows)),
    ]
    tested = {run.label: run.test_metrics for run in runs if run.test_metrics}
    sections = []
    if tested:
        drawn = figures.score_per_site(tested, out / task.metric, task.metric, task.shown, task.chance)
        caption = f"Test {task.shown} per site with its 95 % interval; dashed: the mean over the sites."
        table = html.table(*score_rows([run for run in runs if run.test_metrics]), names=1)
        sections.append(html.Section("Test", [table, html.figure(drawn[-1], caption)]))
        files += drawn
    seen = html.Section("Test cases")
    for k, run in enumerate(runs):
        views = views_of_run(run.folder, run.model or "")
        if views:
            drawn = overlays(views, out / (f"overlays_{k + 1}" if len(runs) > 1 else "overlays"))
            seen.parts += [] if seen.parts else [html.note(PATIENTS)]
            seen.parts += [html.heading(run.label), html.figure(drawn[-1], CAPTION)]
            files += drawn
    if seen.parts:
        sections.append(seen)
    curves = {run.label: run.validation for run in runs if run.validation}
    if curves:
        drawn = figures.score_over_rounds(curves, out / "rounds", task.shown, task.chance)
        caption = f"Validation {task.shown} round by round: a thin line per site, a thick one for their mean."
        sections.append(html.Section("Validation", [html.figure(drawn[-1], caption)]))
        files += drawn
    lead = [html.note(line) for run in runs for line in describe(run).splitlines()]
    return [*files, write_text(out / "index.html", html.page("Report", lead, sections))]
