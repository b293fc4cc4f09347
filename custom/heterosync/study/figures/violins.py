"""Violins of the repeats on a population that no site trained on (paper, Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from heterosync.study.figures.style import COLOURS, INK, LINE_HEIGHT, MUTED, panels, save, tell_absent


def violins(
    series: Mapping[str, Sequence[float | None]],
    stem: Path,
    value: str = "AUC",
    title: str = "",
    reference: str | None = None,
) -> list[Path]:
    """One row per method: a violin over its repeats (from three different values on), a bar from the lower to the upper
    quartile, the median, and every repeat as a point. `series`: method -> one value per repeat (None: not defined)."""
    figure, (panel,) = panels(1, 1, 6.4, LINE_HEIGHT * 1.5 * max(len(series), 1) + 1.0)
    for y, (method, found) in enumerate(series.items()):
        values = [v for v in found if v is not None]
        colour = COLOURS[0] if method == reference else MUTED
        if not values:
            tell_absent(panel, y, "not defined")
            continue
        if len(set(values)) > 2:
            shape = panel.violinplot(values, positions=[y], orientation="horizontal", widths=0.85, showextrema=False)
            for body in shape["bodies"]:
                body.set(facecolor=colour, edgecolor=colour, alpha=0.3)
        lower, median, upper = np.percentile(values, (25, 50, 75))
        panel.plot([lower, upper], [y, y], color=colour, linewidth=4, solid_capstyle="butt")
        panel.plot(values, [y] * len(values), "o", markersize=3, color=colour, markeredgewidth=0)
        panel.plot([median], [y], "D", markersize=5, color=INK, zorder=4)
    panel.axvline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    panel.set_yticks(range(len(series)), list(series))
    panel.set_ylim(len(series) - 0.4, -0.6)
    panel.tick_params(axis="y", length=0)
    panel.set_xlabel(value)
    panel.set_title(title)
    panel.grid(axis="x")
    return save(figure, stem)
