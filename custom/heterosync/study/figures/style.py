"""What all figures share: fonts and colours, the grid of panels, and how a figure becomes files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from heterosync.files import write_with

# Okabe and Ito (2008) without yellow and black, which vanish on light or dark paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
# Seven, so that colour and marker together tell 42 series apart.
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
#: Text and axes, secondary text, grid, background: a page may replace exactly these four by those of its own theme.
INK, MUTED, GRID, PAPER = "#1b1f24", "#66707a", "#dde2e7", "#fefefe"
LINE_HEIGHT = 0.24  # inches per row of names
LEGEND_WIDTH = 1.5  # inches for the names at the right of a figure
#: Lines that an eye can follow in one panel, besides the method that all are compared with.
PER_PANEL = 5


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # a server has no display
    import matplotlib.pyplot as plt

    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "heterosync",
            "svg.fonttype": "none",  # text stays text: it can be searched, and files are small
            "font.size": 9,
            "axes.titlesize": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "grid.color": GRID,
            "grid.linewidth": 0.7,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "axes.edgecolor": MUTED,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "figure.facecolor": PAPER,
            "axes.facecolor": PAPER,
            "savefig.facecolor": PAPER,
            "legend.frameon": False,
        }
    )
    return plt


def save(figure: Any, stem: Path) -> list[Path]:
    """Write `<stem>.png` and `<stem>.svg`, close the figure, return both paths."""
    paths = []
    for suffix, options in ((".png", {"dpi": 160}), (".svg", {"metadata": {"Date": None}})):
        path = stem.with_name(stem.name + suffix)
        write_with(path, partial(figure.savefig, bbox_inches="tight", **options))
        paths.append(path)
    pyplot().close(figure)
    return paths


def look(k: int) -> dict[str, Any]:
    """Colour and marker of series `k`; no two of the first 42 are alike."""
    return {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}


def dash(k: int) -> Any:
    return DASHES[k % len(DASHES)]


def panels(
    count: int, columns: int, width: float, height: float, beside: float = 0.0, **options: Any
) -> tuple[Any, list[Any]]:
    """A figure and `count` axes of `width` x `height` inches in rows of at most `columns`, and `beside` inches for a
    legend at the right; unused places stay empty."""
    columns = max(1, min(columns, count))
    rows = math.ceil(count / columns)
    size = (width * columns + beside, height * rows)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **options)
    flat = [each for row in axes for each in row]
    for spare in flat[count:]:
        spare.remove()
    return figure, flat[:count]


def groups(labels: Sequence[str], reference: str | None) -> list[list[str]]:
    """Labels dealt into groups that one panel can hold, `reference` (where it is one of them) first in each."""
    first = [label for label in labels if label == reference]
    others = [label for label in labels if label != reference]
    count = max(1, math.ceil(len(others) / PER_PANEL))
    size = math.ceil(len(others) / count) if others else 1
    return [first + others[i * size : (i + 1) * size] for i in range(count)]


def wrapped(text: str, width: int = 30) -> str:
    return "\n".join(textwrap.wrap(text, width)) or " "


def tell_absent(panel: Any, y: float, words: str) -> None:
    """Words in the place of a row that has nothing to show."""
    panel.text(
        0.03, y, words, transform=panel.get_yaxis_transform(), va="center", fontsize=7,
        bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1},
    )  # fmt: skip


def unique(rows: Iterable[Iterable[str]]) -> list[str]:
    """All names, each once, in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))
