"""Axial slices of a segmented case with both masks, for a person to judge it by. They stay where the images are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from heterosync.files import write_stream

SLICES = 5
MARGIN = 15.0  # mm shown around the organ
GREY = (1.0, 99.0)  # percentiles of what is shown that become black and white


@dataclass(frozen=True)
class View:
    """Slices of a case from its lower to its upper end, as a radiologist sees them: the patient's right at the left,
    the front above.

    image: uint8 (slices, height, width). mask, found: bool, the reference and the prediction. pixel: height and width
    of a pixel in mm. levels: mm of each slice above the lowest one shown.
    """

    id: str
    dice: float
    image: np.ndarray
    mask: np.ndarray
    found: np.ndarray
    pixel: tuple[float, float]
    levels: tuple[float, ...]


def axial_view(
    id_: str, dice: float, image: np.ndarray, mask: np.ndarray, found: np.ndarray, spacing: Sequence[float]
) -> View:
    """`SLICES` slices over the height of both masks together, and the surroundings of the organ; the whole volume where
    both are empty. All arrays are (x, y, z) towards right, front and top (RAS), `spacing` is in mm."""
    either = mask | found if (mask | found).any() else np.ones(mask.shape, bool)
    shown = []
    for axis in (0, 1):
        inside = np.flatnonzero(either.any(axis=tuple({0, 1, 2} - {axis})))
        margin = round(MARGIN / spacing[axis])
        shown.append(slice(max(0, inside[0] - margin), inside[-1] + margin + 1))
    heights = np.flatnonzero(either.any(axis=(0, 1)))
    low, high = int(heights[0]), int(heights[-1])
    # the middles of equal parts: the very ends of an organ are a few voxels
    levels = np.unique(np.round(low + (high - low) * (np.arange(SLICES) + 0.5) / SLICES).astype(int))

    def slices(volume: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(volume[shown[0], shown[1], levels][::-1, ::-1].transpose(2, 1, 0))

    grey = slices(np.asarray(image, np.float32))
    black, white = np.percentile(grey, GREY)
    grey = np.clip((grey - black) / max(float(white - black), 1e-6), 0, 1)
    return View(
        id_,
        dice,
        np.round(255 * grey).astype(np.uint8),
        slices(mask),
        slices(found),
        (float(spacing[1]), float(spacing[0])),
        tuple(float(level - levels[0]) * float(spacing[2]) for level in levels),
    )


def telling(views: Sequence[View]) -> dict[str, View]:
    """The best, the median (of an even number the lower of the middle two) and the worst case by Dice, each once."""
    ranked = sorted(views, key=lambda view: (-view.dice, view.id))
    if len(ranked) < 2:
        return dict(zip(["the only case"], ranked, strict=False))
    middle = {"median": ranked[len(ranked) // 2]} if len(ranked) > 2 else {}
    return {"best": ranked[0], **middle, "worst": ranked[-1]}


def views_file(model: str) -> str:
    """In the results folder of a site: the test cases as `model` segments them."""
    return f"views_{model.replace(':', '-')}.npz"


def write_views(path: Path, views: Sequence[View]) -> Path:
    """All views in one compressed file, whole or not at all."""
    arrays = {f"{number}.{name}": value for number, view in enumerate(views) for name, value in asdict(view).items()}
    return write_stream(path, lambda file: np.savez_compressed(file, **arrays))


def read_views(path: Path) -> list[View]:
    names = [item.name for item in fields(View)]
    with np.load(path, allow_pickle=False) as stored:
        count = len({key.split(".")[0] for key in stored.files})
        cases = [[stored[f"{number}.{name}"] for name in names] for number in range(count)]
    return [
        View(str(id_), float(dice), image, mask, found, tuple(pixel.tolist()), tuple(levels.tolist()))
        for id_, dice, image, mask, found, pixel, levels in cases
    ]
