"""Predictions of a site, image by image. They stay there."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from heterosync.files import make_folder, read_json, write_json, write_text
from heterosync.training.evaluation import Evaluation

PREDICTIONS = ["id", "split", "label", "probability", "model"]


def write_predictions(folder: Path, site: str, result: Evaluation, split: str, model: str) -> None:
    """Put the scores of `model` into predictions.csv and metrics.json in `folder`; those of other models stay."""
    make_folder(folder)
    rows: list[list[Any]] = []
    table = folder / "predictions.csv"
    if table.exists():
        with table.open(newline="", encoding="utf-8") as file:
            rows = [row for row in list(csv.reader(file))[1:] if row[-1] != model]
    scored = zip(result.ids, result.labels.tolist(), result.probabilities.tolist(), strict=True)
    rows += [[id_, split, label, probability, model] for id_, label, probability in scored]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([PREDICTIONS, *rows])
    write_text(table, text.getvalue())
    summary = folder / "metrics.json"
    metrics = read_json(summary) if summary.exists() else {}
    write_json(summary, {**metrics, model: {"site": site, "split": split, **result.metrics}})
