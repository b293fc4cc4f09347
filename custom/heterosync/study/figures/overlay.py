"""Axial slices with the contours of the reference and of the prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from heterosync.study.figures.style import COLOURS, INK, MUTED, panels, save
from heterosync.training.views import SLICES, View, telling

# Told apart by any colour vision, on grey, and by their lines; a theme's replacements leave both as they are.
REFERENCE = {"colors": COLOURS[4], "linewidths": 1.3, "linestyles": "solid"}
PREDICTION = {"colors": COLOURS[5], "linewidths": 1.3, "linestyles": "dashed"}
CAPTION = (
    "Axial slices from the lower to the upper end of the organ, the patient's right at the left: contours of the "
    "reference (solid) and of the prediction (dashed)."
)
#: Beside every page that holds them.
PATIENTS = (
    "The slices and names of test cases shown here are the sites' own: of patients, unless a program drew the volumes. "
    "Page and figures stay where these images may be."
)
SIDE = 1.5  # inches of a slice's width


def overlays(views: Sequence[View], stem: Path) -> list[Path]:
    """A row for the best, the median and the worst of the cases with its Dice and id. Writes `<stem>.png` and
    `<stem>.svg`; returns both."""
    from matplotlib.lines import Line2D

    rows = telling(views)
    tall = max(view.image.shape[1] * view.pixel[0] / (view.image.shape[2] * view.pixel[1]) for view in rows.values())
    figure, axes = panels(len(rows) * SLICES, SLICES, SIDE, SIDE * tall + 0.35)
    for row, (name, view) in enumerate(rows.items()):
        line = axes[row * SLICES : (row + 1) * SLICES]
        for k, panel in enumerate(line):
            if k < len(view.image):
                _slice(panel, view, k)
            else:
                panel.axis("off")
        line[0].set_title(f"{name}: Dice {view.dice:.3f}\n{view.id}", loc="left", color=INK)
    handles = [
        Line2D([], [], color=style["colors"], linestyle=style["linestyles"], label=label)
        for style, label in ((REFERENCE, "reference"), (PREDICTION, "prediction"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return save(figure, stem)


def _slice(panel: Any, view: View, k: int) -> None:
    from matplotlib.patheffects import withStroke

    height, width = view.image.shape[1:]
    down, across = view.pixel
    box = (0, width * across, height * down, 0)
    panel.imshow(view.image[k], cmap="gray", vmin=0, vmax=255, extent=box, interpolation="bilinear")
    x, y = (np.arange(width) + 0.5) * across, (np.arange(height) + 0.5) * down
    for mask, style in ((view.mask, REFERENCE), (view.found, PREDICTION)):
        if mask[k].any():
            lines = panel.contour(x, y, mask[k].astype(float), levels=[0.5], **style)
            lines.set_path_effects([withStroke(linewidth=2.6, foreground="#000000", alpha=0.6)])  # on bright tissue
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.set_xlabel(f"{view.levels[k]:.0f} mm", color=MUTED, fontsize=7)
