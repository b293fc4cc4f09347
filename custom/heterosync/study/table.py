"""Tables of plain text and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

ABSENT = "-"


def number(value: float | None, digits: int = 3) -> str:
    """A number for a cell; `-` where there is none (an AUC needs both classes)."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def with_interval(value: float | None, low: float | None, high: float | None) -> str:
    """`0.912 (0.85 to 0.95)`; the interval is left out where it is not known."""
    if value is None or low is None or high is None:
        return number(value)
    return f"{value:.3f} ({low:.2f} to {high:.2f})"


def mean(values: Sequence[float | None]) -> float | None:
    """The plain mean over those that are known; None when none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns lined up with spaces, the first to the left and the others to the right, as Markdown that also reads as
    text."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            str(cell).ljust(width) if i == 0 else str(cell).rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = (
        "|" + "|".join("-" * (width + 2) if i == 0 else "-" * (width + 1) + ":" for i, width in enumerate(widths)) + "|"
    )
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def csv_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()
