"""Predictions of a site, case by case. They stay there."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from heterosync.files import make_folder, read_json, write_json, write_text
from heterosync.training.examples import Outcome


def write_predictions(folder: Path, site: str, columns: Sequence[str], result: Outcome, split: str, model: str) -> None:
    """Put the scores of `model` into predictions.csv (`columns`, the last is the model) and metrics.json in `folder`;
    those of other models stay. What else the task keeps of each case comes to lie beside them."""
    make_folder(folder)
    rows: list[list[Any]] = []
    table = folder / "predictions.csv"
    if table.exists():
        with table.open(newline="", encoding="utf-8") as file:
            rows = [row for row in list(csv.reader(file))[1:] if row[-1] != model]
    rows += result.rows(split, model)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    write_text(table, text.getvalue())
    summary = folder / "metrics.json"
    metrics = read_json(summary) if summary.exists() else {}
    result.keep(folder, model)
    write_json(summary, {**metrics, model: {"site": site, "split": split, **result.metrics}})
