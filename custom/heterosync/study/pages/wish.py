"""What a report on a study is asked for, and what comes of it; its files and their names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE, FIGURES, TABLES = "index.html", "figures", "tables"
MARK, COMMAND = ".heterosync-report", "heterosync study report"


@dataclass(frozen=True)
class Wish:
    """out: None for report/ in the study's folder; reference: what all others are compared with, None for the usual
    one; resamples: of every bootstrap, None for the usual number; maps: also t-SNE maps, which take the longest."""

    out: Path | None = None
    reference: str | None = None
    resamples: int | None = None
    maps: bool = True


@dataclass(frozen=True)
class Made:
    """text: for a terminal; facts: for a program; page: the file to open."""

    text: str
    facts: dict[str, Any]
    page: Path
