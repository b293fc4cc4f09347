"""How the data lie: bars whose length is a site's volume and whose colour its share of positives (paper, Fig. 2)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from heterosync.study.figures.style import INK, LINE_HEIGHT, panels, pyplot, save


def distribution(
    series: Mapping[str, Mapping[str, tuple[int, int]]], stem: Path, value: str = "images", positive: str = "positive"
) -> list[Path]:
    """One bar per level and site. `series`: level ("" where there is none) -> site -> (negative, positive) images;
    `positive`: name of the positive label."""
    rows = [(level, site, counts) for level, sites in series.items() for site, counts in sites.items()]
    figure, (panel,) = panels(1, 1, 7.2, LINE_HEIGHT * 1.1 * len(rows) + 0.9)
    plt = pyplot()
    colours = plt.get_cmap("cividis")
    largest = max((sum(counts) for _, _, counts in rows), default=1) or 1
    for y, (_, _, (negative, found)) in enumerate(rows):
        total = negative + found
        share = found / total if total else 0.0
        panel.barh(y, total, height=0.72, color=colours(share), edgecolor=INK, linewidth=0.5)
        panel.text(total + 0.01 * largest, y, f"{total:,} ({_percent(share, found)})", va="center", fontsize=7.5)
    names = [f"{level}  {site}" if level else site for level, site, _ in rows]
    panel.set_yticks(range(len(rows)), names)
    for y in range(1, len(rows)):
        if rows[y][0] != rows[y - 1][0]:
            panel.axhline(y - 0.5, linewidth=0.5, color=INK, alpha=0.4)
    panel.set_ylim(len(rows) - 0.4, -0.6)
    panel.set_xlim(0, 1.36 * largest)
    panel.set_xlabel(value)
    panel.tick_params(axis="y", length=0)
    scale = plt.cm.ScalarMappable(norm=plt.Normalize(0, 100), cmap=colours)
    figure.colorbar(scale, ax=panel, label=f"{positive} (%)", aspect=30, pad=0.02)
    return save(figure, stem)


def _percent(share: float, found: int) -> str:
    """Few positives are counted, not rounded to 0 %."""
    return f"{found} positive" if found < 20 else f"{100 * share:.0f} % positive"
