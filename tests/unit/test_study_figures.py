"""Figures hold the numbers that they are given; names do not overlap; nothing is told by colour alone."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest

from heterosync.study.evidence.statistics import roc_band
from heterosync.study.figures import bars, boxes, cost, curves, embedding, lines, roc, run, style, violins

METHODS = [f"method-{k}" if k else "hsl" for k in range(15)] + ["fedavg-equal_steps"]
SITES = ["screening-centre", "specialised-hospital", "clinic-1", "clinic-2", "rare-disease-region", "north", "south"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would have been written, in order."""
    figures = []

    def keep(figure, stem):
        figures.append(figure)
        return []

    for module in (bars, boxes, cost, curves, embedding, lines, roc, violins):
        monkeypatch.setattr(module, "save", keep)
    yield figures
    for figure in figures:
        style.pyplot().close(figure)


def texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def apart(artists, figure) -> bool:
    """No two of these texts cover each other."""
    renderer = figure.canvas.get_renderer()
    boxes_ = [artist.get_window_extent(renderer) for artist in artists if artist.get_text().strip()]
    return not any(a.overlaps(b) for a, b in itertools.combinations(boxes_, 2))


def test_box_is_median_quartiles_minimum_and_maximum(drawn, tmp_path):
    values = [0.6, 0.9, 0.7, 0.75, 0.5]
    boxes.boxes({"a": {"hsl": values}}, tmp_path / "x", reference="hsl")
    (axes,) = drawn[0].axes
    found = {tuple(line.get_xdata()) for line in axes.lines}
    assert (0.75 - 0.05, 0.75 - 0.05) in {tuple(np.round(x, 10)) for x in found if len(x) == 2}  # median 0.7
    assert (0.6, 0.5) in found and (0.75, 0.9) in found  # whiskers from the quartiles to minimum and maximum
    assert tuple(values) in found  # every repeat


def test_box_says_what_is_not_there(drawn, tmp_path):
    series = {"a": {"hsl": [0.5, None, 0.7], "local": [None] * 3, "moon": [0.8] * 3}, "b": {"hsl": [0.9] * 3}}
    boxes.boxes(series, tmp_path / "x", notes={"a": "test: 9 images, 1 positive"})
    first, second = drawn[0].axes
    assert texts(first) == ["2/3", "not defined"]
    assert texts(second) == ["no run", "no run"]
    assert first.get_title() == "a\ntest: 9 images, 1 positive" and second.get_title() == "b"


def test_boxes_of_16_methods_at_7_sites_do_not_overlap(drawn, tmp_path):
    rng = np.random.default_rng(0)
    series = {site: {method: rng.uniform(0.5, 1, 5).tolist() for method in METHODS} for site in SITES}
    boxes.boxes(series, tmp_path / "x", notes=dict.fromkeys(SITES, "test: 4279 images, 2001 positive"))
    (figure,) = drawn
    figure.canvas.draw()
    assert apart([axes.title for axes in figure.axes], figure)
    names = figure.axes[0].get_yticklabels()
    assert [name.get_text() for name in names] == METHODS and apart(names, figure)
    for axes in figure.axes:
        assert apart([axes.title, *axes.get_xticklabels()], figure)


def test_groups_hold_the_reference_and_every_method_once():
    groups = style.groups(METHODS, "hsl")
    assert [len(group) for group in groups] == [6, 6, 6] and all(group[0] == "hsl" for group in groups)
    assert [name for group in groups for name in group[1:]] == METHODS[1:]
    assert style.groups(["a", "b"], "hsl") == [["a", "b"]] and style.groups(["hsl"], "hsl") == [["hsl"]]


def test_no_two_of_42_series_look_alike():
    looks = [tuple(style.look(k).values()) for k in range(42)]
    assert len(set(looks)) == 42
    assert style.INK not in style.COLOURS  # a page in dark replaces the ink


def test_level_lines_show_mean_spread_gaps_and_positives(drawn, tmp_path):
    series = {"node-1": {"hsl": {"2:1": [0.8, 0.9], "9:1": [None, None]}, "local": {"2:1": [0.5, None]}}}
    notes = {"node-1": {"2:1": "(40)", "9:1": "(0)"}}
    lines.level_lines(series, ["2:1", "9:1"], tmp_path / "x", notes=notes, reference="hsl")
    (axes,) = drawn[0].axes
    by_name = {line.get_label(): line for line in axes.lines}
    assert by_name["hsl"].get_ydata()[0] == pytest.approx(0.85) and math.isnan(by_name["hsl"].get_ydata()[1])
    assert by_name["local"].get_ydata()[0] == 0.5
    assert [0.8, 0.9] in [list(line.get_ydata()) for line in axes.lines]  # the spread
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["2:1\n(40)", "9:1\n(0)"]


def test_level_lines_of_16_methods_have_readable_names(drawn, tmp_path):
    levels = [f"{r}:1" for r in (2, 4, 6, 8, 10, 20, 40, 60, 80, 100)]
    series = {site: {m: {level: [0.7, 0.8] for level in levels} for m in METHODS} for site in ("node-1", "node-2")}
    notes = {site: dict.fromkeys(levels, "(1985)") for site in series}
    lines.level_lines(series, levels, tmp_path / "x", notes=notes, reference="hsl")
    (figure,) = drawn
    figure.canvas.draw()
    assert len(figure.axes) == 6
    for axes in figure.axes:
        assert apart(axes.get_xticklabels(), figure)


def test_roc_holds_the_bands_and_names_the_undefined(drawn, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 20)
    band = roc_band(labels, labels + rng.normal(size=40), resamples=50)
    roc.rocs({"a": {"hsl": ("0.9 (0.8 to 1.0)", band), "local": ("AUC not defined", None)}}, tmp_path / "x")
    (axes,) = drawn[0].axes
    curve = next(line for line in axes.lines if line.get_label().startswith("hsl"))
    assert np.array_equal(curve.get_xdata(), band.fpr) and np.array_equal(curve.get_ydata(), band.tpr)
    low, high = axes.collections[0].get_paths()[0].get_extents().get_points()[:, 1]
    assert low == band.low.min() and high == band.high.max()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "hsl 0.9 (0.8 to 1.0)",
        "local AUC not defined",
    ]


def test_violins_need_three_values_and_show_every_repeat(drawn, tmp_path):
    violins.violins({"hsl": [0.7, 0.8, 0.9], "b": [0.6, 0.8], "c": [None]}, tmp_path / "x", reference="hsl")
    (axes,) = drawn[0].axes
    assert len(axes.collections) == 1  # b has points only
    shown = [list(line.get_xdata()) for line in axes.lines]
    assert [0.7, 0.8, 0.9] in shown and [0.6, 0.8] in shown
    assert [pytest.approx(0.8)] in shown and [pytest.approx(0.7)] in shown  # medians
    assert texts(axes) == ["not defined"]


def test_bars_are_as_long_as_the_data_and_count_few_positives(drawn, tmp_path):
    counts = {"a": (50, 50), "rare": (993, 7), "empty": (0, 0)}
    bars.distribution({"": counts}, tmp_path / "x")
    axes = drawn[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [100, 1000, 0]
    assert texts(axes) == ["100 (50 % positive)", "1,000 (7 positive)", "0 (0 positive)"]
    shades = [bar.get_facecolor() for bar in axes.patches]
    assert shades[0] != shades[1]


def test_embedding_keeps_a_site_s_look_in_all_maps(drawn, tmp_path):
    points = np.arange(12.0).reshape(6, 2)
    maps = [
        embedding.Map("before", "0.9", points, ["a", "a", "b", "b", "c", "c"]),
        embedding.Map("after", "0.4", points, ["b", "b", "a", "a", "c", "c"]),
    ]
    embedding.embeddings(maps, tmp_path / "x")
    before, after = drawn[0].axes
    assert before.get_title() == "before\n0.9"
    of_a = [{c.get_label(): c for c in axes.collections}["a"] for axes in (before, after)]
    assert np.array_equal(of_a[0].get_offsets(), points[:2]) and np.array_equal(of_a[1].get_offsets(), points[2:4])
    assert np.array_equal(of_a[0].get_facecolor(), of_a[1].get_facecolor())


def test_curves_show_mean_and_range(drawn, tmp_path):
    curves.convergence({"part": {"hsl": {0: [0.5, 0.7], 1: [0.8, 0.8]}}}, tmp_path / "x")
    (axes,) = drawn[0].axes
    line = next(line for line in axes.lines if line.get_label() == "hsl")
    assert list(line.get_xdata()) == [0, 1] and list(line.get_ydata()) == pytest.approx([0.6, 0.8])
    extents = axes.collections[0].get_paths()[0].get_extents()
    assert (extents.y0, extents.y1) == (0.5, 0.8)


def test_coupling_is_logarithmic_where_the_tasks_differ_by_orders(drawn, tmp_path):
    wide, narrow = {"hsl": {0: [1.0], 1: [1e-4]}}, {"hsl": {0: [0.4], 1: [0.5]}}
    curves.coupling({"wide": wide, "narrow": narrow, "zero": {"hsl": {0: [0.0], 1: [1.0]}}}, tmp_path / "x")
    assert [axes.get_yscale() for axes in drawn[0].axes] == ["log", "linear", "linear"]


def test_cost_bars(drawn, tmp_path):
    cost.costs({"hours": {"hsl": 2.0, "local": 1.0}, "GiB": {"hsl": 3.5}}, tmp_path / "x")
    hours, memory = drawn[0].axes
    assert [bar.get_width() for bar in hours.patches] == [2.0, 1.0] and texts(hours) == ["2", "1"]
    assert texts(memory) == ["3.5"]


def test_files_are_the_same_for_the_same_numbers(tmp_path):
    series = {"a": {"hsl": [0.5, 0.7, 0.9]}}
    first, second = (boxes.boxes(series, tmp_path / name / "x") for name in "12")
    assert [path.name for path in first] == ["x.png", "x.svg"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_figures_of_many_runs_tell_them_apart(monkeypatch, tmp_path):
    kept = SimpleNamespace()
    monkeypatch.setattr(run, "save", lambda figure, stem: setattr(kept, "figure", figure) or [])
    series = {f"run {k}": {"a": {"auc": 0.5 + k / 100}} for k in range(16)}
    run.score_per_site(series, tmp_path / "x")
    marks = {(c[0].get_color(), c[0].get_marker()) for c in kept.figure.axes[0].containers}
    assert len(marks) == 16
    style.pyplot().close(kept.figure)
