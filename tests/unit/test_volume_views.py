"""Slices with both masks: cut as a radiologist sees them, kept whole, drawn for any eye."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from heterosync.study.figures.overlay import overlays
from heterosync.study.pages import html
from heterosync.training.views import SLICES, View, axial_view, read_views, telling, write_views

SHAPE, SPACING = (40, 30, 12), (1.0, 2.0, 3.0)


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image (RAS) that is bright to the right and dark to the front, with two overlapping blocks."""
    x, y, z = np.indices(SHAPE)
    image = (x - y + 0 * z).astype(np.float32)
    mask, found = np.zeros(SHAPE, bool), np.zeros(SHAPE, bool)
    mask[18:24, 10:16, 2:9] = True
    found[20:26, 12:16, 4:11] = True
    return image, mask, found


def view(dice: float = 0.5, id_: str = "a") -> View:
    return axial_view(id_, dice, *arrays(), SPACING)


def test_slices_are_seen_from_below_with_the_front_above() -> None:
    image, mask, found = arrays()
    seen = view()
    assert seen.image.shape == (SLICES, 22, 37)  # 15 mm around x 18 to 25, to the border, and y 10 to 15
    assert seen.image.dtype == np.uint8 and seen.pixel == (2.0, 1.0)
    low, high = seen.image[2][-1], seen.image[2][0]  # rows: back, front
    assert int(low[0]) > int(low[-1]) and int(low[0]) > int(high[0])  # right at the left, front above
    levels = np.unique(np.round(2 + 8 * (np.arange(SLICES) + 0.5) / SLICES).astype(int))
    assert seen.levels == tuple(3.0 * (level - levels[0]) for level in levels)
    for k, level in enumerate(levels):
        assert seen.mask[k].sum() == mask[:, :, level].sum() and seen.found[k].sum() == found[:, :, level].sum()
    drawn, mine = np.nonzero(seen.mask[1]), np.nonzero(seen.found[1])
    assert drawn[0].max() > mine[0].max() and drawn[1].max() > mine[1].max()  # further back, and to the left


def test_empty_masks_show_the_whole_volume() -> None:
    image, mask, found = arrays()
    seen = axial_view("x", 1.0, image, mask & False, found & False, SPACING)
    assert seen.image.shape == (SLICES, SHAPE[1], SHAPE[0]) and not seen.mask.any()
    flat = axial_view("x", 1.0, 0 * image, mask, found, SPACING)
    assert not flat.image.any()


def test_best_median_and_worst_are_told_once() -> None:
    cases = [replace(view(), dice=dice, id=str(dice)) for dice in (0.5, 0.9, 0.1, 0.7)]
    assert {name: case.dice for name, case in telling(cases).items()} == {"best": 0.9, "median": 0.5, "worst": 0.1}
    assert list(telling(cases[:2])) == ["best", "worst"]
    assert list(telling(cases[:1])) == ["the only case"] and telling([]) == {}


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    cases = [view(0.25, "site/ä.nii.gz"), view(1.0, "b")]
    again = read_views(write_views(tmp_path / "views.npz", cases))
    for mine, other in zip(cases, again, strict=True):
        assert (other.id, other.dice, other.pixel, other.levels) == (mine.id, mine.dice, mine.pixel, mine.levels)
        for name in ("image", "mask", "found"):
            assert np.array_equal(getattr(mine, name), getattr(other, name))
            assert getattr(mine, name).dtype == getattr(other, name).dtype
    assert read_views(write_views(tmp_path / "none.npz", [])) == []


def test_a_figure_of_three_cases(tmp_path: Path) -> None:
    cases = [view(dice, f"case <{dice}>") for dice in (0.9, 0.5, 0.1)]
    png, svg = overlays(cases, tmp_path / "overlays")
    first = svg.read_bytes()
    text = first.decode()
    for words in ("best: Dice 0.900", "median: Dice 0.500", "worst: Dice 0.100", "reference", "prediction"):
        assert words in text
    assert "stroke-dasharray" in text and "#e69f00" in text and "#56b4e9" in text
    overlays(cases, tmp_path / "overlays")
    assert svg.read_bytes() == first and png.stat().st_size > 10_000
    markup = html.figure(svg, "Test cases")
    assert markup.count("data:image/png;base64") == 3 * SLICES and "xlink" not in markup
    assert "#e69f00" in markup and "#56b4e9" in markup  # the same on light and on dark paper
