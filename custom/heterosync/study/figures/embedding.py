"""t-SNE maps of the features of all sites, before and after training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heterosync.study.figures.style import look, panels, save, unique


@dataclass(frozen=True)
class Map:
    """Points (n, 2) with the site of each; `title` and the line of numbers below it."""

    title: str
    numbers: str
    points: np.ndarray
    sites: Sequence[str]


def embeddings(maps: Sequence[Map], stem: Path, columns: int = 2) -> list[Path]:
    """One panel per map, in rows of `columns`; a site has the same colour and marker in all of them. The axes of a
    t-SNE map have no unit and no meaning: they are left out."""
    sites = unique(each.sites for each in maps)
    figure, axes = panels(len(maps), columns, 3.5, 3.3)
    for panel, each in zip(axes, maps, strict=True):
        where = np.asarray(each.sites)
        for k, site in enumerate(sites):
            chosen = each.points[where == site]
            style = look(k)
            panel.scatter(
                chosen[:, 0], chosen[:, 1], s=13, c=style["color"], marker=style["marker"], linewidths=0, alpha=0.8,
                label=site,
            )  # fmt: skip
        panel.set_title(f"{each.title}\n{each.numbers}", fontsize=8.5)
        panel.set_xticks([])
        panel.set_yticks([])
        for spine in panel.spines.values():
            spine.set_visible(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(sites)), fontsize=8, markerscale=1.4)
    return save(figure, stem)
