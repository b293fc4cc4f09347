"""What happened round by round: validation scores, and how strongly the two tasks of HSL are coupled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heterosync.study.figures.style import LEGEND_WIDTH, MUTED, dash, groups, look, panels, save, unique, wrapped

Rounds = Mapping[int, Sequence[float]]


def convergence(
    series: Mapping[str, Mapping[str, Rounds]],
    stem: Path,
    value: str = "validation AUC, mean over sites",
    reference: str | None = None,
    chance: float | None = 0.5,
) -> list[Path]:
    """A panel per part (scenario or level) and group of methods: mean over the repeats and the band from minimum to
    maximum. `series`: part -> method -> rounds of training -> one value per repeat."""
    rows = groups(unique(series.values()), reference)
    columns = len(series) if len(series) > 1 else 3  # a row per group, or the groups of a single part beside each other
    beside = LEGEND_WIDTH if len(series) > 1 else 0.0
    height = 2.6 if beside else 3.4
    figure, axes = panels(len(rows) * len(series), columns, 3.2, height, beside, sharex=True, sharey=True)
    order = [(group, part) for group in rows for part in series]
    for panel, (group, part) in zip(axes, order, strict=True):
        for k, method in enumerate(group):
            _band(panel, series[part].get(method, {}), method, k, 2.0 if method == reference else 1.2)
        if chance is not None:
            panel.axhline(chance, color=MUTED, linewidth=0.8, linestyle=":")
        panel.set_title(wrapped(part))
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.xaxis.set_tick_params(labelbottom=True)
        panel.grid(axis="y")
        if not beside:
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=7.5, borderaxespad=0)
        elif part == list(series)[-1]:
            panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    figure.supxlabel("rounds of training that the model has seen", fontsize=9)
    figure.supylabel(value, fontsize=9)
    return save(figure, stem)


def coupling(series: Mapping[str, Mapping[str, Rounds]], stem: Path, columns: int = 3) -> list[Path]:
    """One panel per quantity, one line per method: mean over sites and repeats, band from minimum to maximum.

    `series`: quantity -> method -> round -> values (one per site and repeat). The scale is logarithmic where all values
    are above zero and they span more than a factor of 20: the two tasks may differ by orders of magnitude.
    """
    figure, axes = panels(len(series), columns, 3.2, 2.6)
    methods = unique(series.values())
    for panel, (quantity, found) in zip(axes, series.items(), strict=True):
        values = [v for rounds in found.values() for each in rounds.values() for v in each]
        if values and min(values) > 0 and max(values) > 20 * min(values):
            panel.set_yscale("log")
        else:
            panel.ticklabel_format(axis="y", scilimits=(-2, 4))
        for k, method in enumerate(methods):
            _band(panel, found.get(method, {}), method, k, 1.6)
        panel.set_title(wrapped(quantity, 34))
        panel.set_xlabel("round")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(axis="y")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=8)
    return save(figure, stem)


def _band(panel: Any, rounds: Rounds, label: str, k: int, width: float) -> None:
    at = sorted(r for r, values in rounds.items() if values)
    if not at:
        return
    style = look(k)
    means = [sum(rounds[r]) / len(rounds[r]) for r in at]
    panel.plot(at, means, markersize=3, linewidth=width, linestyle=dash(k), label=label, **style)
    low, high = [min(rounds[r]) for r in at], [max(rounds[r]) for r in at]
    if low != high:
        panel.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
