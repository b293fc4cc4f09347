"""What a method costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from heterosync.study.figures.style import COLOURS, LINE_HEIGHT, MUTED, panels, save, unique


def costs(series: Mapping[str, Mapping[str, float]], stem: Path, reference: str | None = None) -> list[Path]:
    """One panel per cost, one bar per method with its value. `series`: cost with its unit -> method -> value."""
    methods = unique(series.values())
    figure, axes = panels(len(series), 3, 3.0, LINE_HEIGHT * len(methods) + 0.8, sharey=True)
    for panel, (cost, found) in zip(axes, series.items(), strict=True):
        largest = max(found.values(), default=0.0) or 1.0
        for y, method in enumerate(methods):
            if method in found:
                panel.barh(y, found[method], height=0.66, color=COLOURS[0] if method == reference else MUTED)
                panel.text(found[method] + 0.02 * largest, y, f"{found[method]:.3g}", va="center", fontsize=7)
        panel.set_yticks(range(len(methods)), methods)
        panel.set_ylim(len(methods) - 0.4, -0.6)
        panel.set_xlim(0, 1.25 * largest)
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel(cost)
    return save(figure, stem)
