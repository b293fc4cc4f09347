"""The scores of test volumes of a run: predictions.csv, case by case."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

from heterosync.data.tables import read_csv
from heterosync.errors import ProblemList, UserError
from heterosync.files import write_text
from heterosync.study.evidence.cross_site import SCORE_COLUMNS, CaseDice
from heterosync.study.layout import PREDICTIONS
from heterosync.study.table import csv_table


def write_scores(folder: Path | str, scores: Iterable[CaseDice]) -> Path:
    """Write predictions.csv into `folder`; numbers keep every digit, an undefined distance is empty."""
    return write_text(Path(folder) / PREDICTIONS, csv_table(SCORE_COLUMNS, [astuple(score) for score in scores]))


def read_scores(folder: Path | str) -> list[CaseDice]:
    """The rows of predictions.csv. Raises `UserError` when it is absent or no such table, `ProblemList` with every bad
    row."""
    path = Path(folder) / PREDICTIONS
    table = read_csv(path)
    if tuple(table.header) != SCORE_COLUMNS:
        raise UserError(f"{path}: the header must be {','.join(SCORE_COLUMNS)}, not {','.join(table.header)}")
    scores, problems = [], []
    for (line, row), (_, values) in zip(table.records(), table.rows, strict=True):
        wrong = table.ragged(values) or _wrong(row)
        if wrong:
            problems.append(f"{path} line {line}: {wrong}")
        else:
            scores.append(CaseDice.of(row["model"], row["site"], {**row, "id": row["case"]}))
    if problems:
        raise ProblemList(problems)
    return scores


def _wrong(row: dict[str, str]) -> str | None:
    if not all(row[name] for name in ("model", "site", "case")):
        return "model, site and case must not be empty"
    for name, most in (("dice", 1.0), ("hd95", math.inf), ("volume", math.inf), ("reference_volume", math.inf)):
        if name == "hd95" and not row[name]:
            continue  # nothing was found
        try:
            good = 0 <= float(row[name]) <= most and math.isfinite(float(row[name]))
        except ValueError:
            good = False
        if not good:
            return f"{name} '{row[name]}' must be a number from 0" + (" to 1" if most == 1 else "")
    return None
