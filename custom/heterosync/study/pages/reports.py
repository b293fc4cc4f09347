"""The report on a study, whatever its methods learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from heterosync.errors import UserError
from heterosync.files import read_json
from heterosync.study.layout import STUDY
from heterosync.study.pages import study_report, volume_report
from heterosync.study.pages.wish import Made, Wish
from heterosync.training import CLASSIFICATION, SEGMENTATION

#: Task of a study's plan -> what reports on it.
REPORTS: dict[str, Callable[[Path, Wish, Callable[[str], None]], Made]] = {
    CLASSIFICATION.name: study_report.make_report,
    SEGMENTATION.name: volume_report.make_report,
}


def report_on(folder: Path, wish: Wish, say: Callable[[str], None] = lambda line: None) -> Made:
    """Read a study, whole or still going, and write its report. Raises `UserError` where there is nothing to tell."""
    path = folder / STUDY
    info = read_json(path) if path.is_file() else {}  # what is missing or damaged is told by the reader
    plan = info.get("plan") if isinstance(info, dict) else None
    task = plan.get("task", CLASSIFICATION.name) if isinstance(plan, dict) else CLASSIFICATION.name
    if task not in REPORTS:
        raise UserError(f"{path}: its task '{task}' is not known to this version of heterosync: take the one it is of")
    return REPORTS[task](folder, wish, say)
