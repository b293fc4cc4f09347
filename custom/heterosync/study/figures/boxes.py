"""Box plots per site and method (paper, Fig. 2a and 2d)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from heterosync.study.figures.style import COLOURS, INK, LINE_HEIGHT, MUTED, panels, save, tell_absent, unique, wrapped

COLUMNS = 4


def boxes(
    series: Mapping[str, Mapping[str, Sequence[float | None]]],
    stem: Path,
    value: str = "test AUC",
    notes: Mapping[str, str] | None = None,
    reference: str | None = None,
    chance: float | None = 0.5,
    counted: bool = True,
) -> list[Path]:
    """One panel per site, one box per method over its repeats: median, quartiles, whiskers to minimum and maximum.

    `series`: site -> method -> one value per repeat, None where it is not defined. `notes`: site -> a line below its
    name (test images, positives). `reference` is drawn in colour; a dotted line marks `chance`. Where fewer values than
    the most are defined, their number stands at the right end of the row, unless `counted` is off. Writes `<stem>.png`
    and `<stem>.svg`.
    """
    methods = unique(series.values())
    most = max((len(values) for site in series.values() for values in site.values()), default=0)
    known = [v for site in series.values() for values in site.values() for v in values if v is not None]
    low = min([*known, *([] if chance is None else [chance])]) if known else 0.0
    height = LINE_HEIGHT * len(methods) + 0.75
    figure, axes = panels(len(series), COLUMNS, 2.7, height, sharex=True, sharey=True)
    for panel, (site, found) in zip(axes, series.items(), strict=True):
        for y, method in enumerate(methods):
            values = [v for v in found.get(method, ()) if v is not None]
            colour = COLOURS[0] if method == reference else MUTED
            if values:
                line = {"color": colour, "linewidth": 1.1}
                panel.boxplot(
                    values,
                    positions=[y],
                    orientation="horizontal",
                    widths=0.62,
                    whis=(0, 100),
                    showfliers=False,
                    manage_ticks=False,
                    boxprops=line,
                    whiskerprops=line,
                    capprops=line,
                    medianprops={"color": COLOURS[1] if method == reference else INK, "linewidth": 2},
                )
                panel.plot(values, [y] * len(values), "o", markersize=2.6, color=colour, alpha=0.7)
            else:
                tell_absent(panel, y, "not defined" if method in found else "no run")
            if counted and values and len(values) < most:
                tell = f"{len(values)}/{most}"
                panel.text(1.01, y, tell, transform=panel.get_yaxis_transform(), va="center", fontsize=6.5, color=MUTED)
        if chance is not None:
            panel.axvline(chance, color=MUTED, linewidth=0.8, linestyle=":")
        panel.set_title("\n".join(filter(None, [wrapped(site), (notes or {}).get(site, "")])))
        panel.grid(axis="x")
        panel.set_yticks(range(len(methods)), methods)
        panel.set_ylim(len(methods) - 0.4, -0.6)
        panel.set_xlim(low - 0.03, 1.02)
        panel.tick_params(axis="y", length=0)
        panel.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel(value, fontsize=9)
    return save(figure, stem)
