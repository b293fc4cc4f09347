"""ROC curves with bootstrap bands, one panel per site (paper, Fig. 4)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from heterosync.study.evidence.statistics import RocBand
from heterosync.study.figures.style import MUTED, dash, groups, look, panels, save, unique, wrapped

COLUMNS = 4


def rocs(
    series: Mapping[str, Mapping[str, tuple[str, RocBand | None]]],
    stem: Path,
    notes: Mapping[str, str] | None = None,
    reference: str | None = None,
) -> list[Path]:
    """One panel per site and group of methods: mean curve and 95 % band over the resamples.

    `series`: site -> method -> (its AUC in words, its band; None: no curve, one class is absent).
    """
    rows = groups(unique(series.values()), reference)
    columns = len(rows) if len(rows) > 1 else COLUMNS  # one row per site where there are several groups
    figure, axes = panels(len(rows) * len(series), columns, 2.9, 3.6, sharex=True, sharey=True)
    order = [(site, group) for site in series for group in rows]
    for panel, (site, group) in zip(axes, order, strict=True):
        for k, method in enumerate(group):
            if method not in series[site]:
                continue
            told, band = series[site][method]
            label = f"{method} {told}"
            if band is None:
                panel.plot([], [], " ", label=label)
                continue
            colour = look(k)["color"]
            panel.fill_between(band.fpr, band.low, band.high, color=colour, alpha=0.13, linewidth=0)
            panel.plot(band.fpr, band.tpr, color=colour, linestyle=dash(k), linewidth=1.6, label=label)
        panel.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=":")
        panel.set_aspect("equal")
        panel.set_xticks([0, 0.5, 1])
        panel.grid()
        panel.set_title("\n".join(filter(None, [wrapped(site), (notes or {}).get(site, "")])))
        panel.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=7, borderaxespad=0)
        panel.xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel("false positive rate", fontsize=9)
    figure.supylabel("true positive rate", fontsize=9)
    return save(figure, stem)
