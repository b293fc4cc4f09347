"""A metric against the level of a skew (paper, Fig. 2b and 2c)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from heterosync.study.figures.style import LEGEND_WIDTH, MUTED, dash, groups, look, panels, save, unique, wrapped

DODGE = 0.09  # of a level's width between neighbouring methods, so that their spreads do not cover each other


def level_lines(
    series: Mapping[str, Mapping[str, Mapping[str, Sequence[float | None]]]],
    levels: Sequence[str],
    stem: Path,
    value: str = "test AUC",
    notes: Mapping[str, Mapping[str, str]] | None = None,
    reference: str | None = None,
    axis: str = "level",
) -> list[Path]:
    """A column of panels per site, a row per group of methods: the mean over the repeats at every level, and a bar from
    minimum to maximum.

    `series`: site -> method -> level -> one value per repeat (None: not defined). `notes`: site -> level -> what stands
    below the level (test positives). Every group holds `reference`. A level without a defined value is a gap.
    """
    rows = groups(unique(series.values()), reference)
    width = max(2.8, 0.46 * len(levels) + 0.6)
    figure, axes = panels(len(rows) * len(series), len(series), width, 2.9, LEGEND_WIDTH, sharey=True)
    for i, group in enumerate(rows):
        for j, (site, found) in enumerate(series.items()):
            panel = axes[i * len(series) + j]
            for k, method in enumerate(group):
                at = [x + (k - (len(group) - 1) / 2) * DODGE for x in range(len(levels))]
                values = [[v for v in found.get(method, {}).get(level, ()) if v is not None] for level in levels]
                means = [sum(v) / len(v) if v else math.nan for v in values]
                style = {**look(k), "linestyle": dash(k), "zorder": 3 if method == reference else 2}
                panel.plot(at, means, markersize=4, linewidth=2 if method == reference else 1.2, label=method, **style)
                for x, v in zip(at, values, strict=True):
                    if len(v) > 1:
                        panel.plot([x, x], [min(v), max(v)], color=style["color"], linewidth=1, alpha=0.8)
            told = (notes or {}).get(site, {})
            ticks = [f"{level}\n{told[level]}" if level in told else level for level in levels]
            panel.set_xticks(range(len(levels)), ticks, fontsize=7)
            panel.set_xlim(-0.5, len(levels) - 0.5)
            panel.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
            panel.grid(axis="y")
            panel.set_title(wrapped(site))
            if j == 0:
                panel.set_ylabel(value)
            if i == len(rows) - 1:
                panel.set_xlabel(axis)
            if j == len(series) - 1:
                panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    axes[0].set_ylim(top=1.02)
    return save(figure, stem)
