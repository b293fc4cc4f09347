"""Cross-site tables and paired t-tests against independent computation."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from heterosync.errors import UserError
from heterosync.federation.modelfile import load_model
from heterosync.methods import make_method
from heterosync.study.ensemble import build_alike
from heterosync.study.evidence.cross_site import (
    PUBLISHED,
    CaseDice,
    cross_site_table,
    paired_tests,
    published_table,
    score_ensemble,
)
from heterosync.study.evidence.volume_outcomes import VolumeStudy
from heterosync.study.pages import volume_page_tables
from heterosync.study.pages.volume_report import VolumeResults, report_dict
from heterosync.study.segment import open_segmenter
from segment_toys import toy_segmenter


def scores(model: str, site: str, values: list[float]) -> list[CaseDice]:
    return [CaseDice(model, site, f"case {i}", value) for i, value in enumerate(values)]


def test_the_paired_t_test_by_its_formula() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.uniform(0.7, 0.9, 12), rng.uniform(0.6, 0.9, 12)
    rows = [*scores("a", "x", theirs[:5].tolist()), *scores("a", "y", theirs[5:].tolist())]
    rows += [*scores("fl", "y", ours[5:].tolist()), *scores("fl", "x", ours[:5].tolist())]  # in another order
    found = paired_tests(rows, "fl")["a"]
    d = ours - theirs
    t = d.mean() / (d.std(ddof=1) / math.sqrt(12))
    assert (found.n, found.difference) == (12, pytest.approx(d.mean()))
    assert found.t == pytest.approx(t) and found.p == pytest.approx(2 * stats.t.sf(abs(t), 11))


def test_equal_models_do_not_differ() -> None:
    found = paired_tests([*scores("a", "x", [0.5, 0.6]), *scores("fl", "x", [0.5, 0.6])], "fl")["a"]
    assert (found.t, found.p) == (0.0, 1.0)


def test_a_difference_that_is_the_same_in_all_cases_has_an_infinite_t() -> None:
    rows = [CaseDice(model, "a", str(k), dice) for model, dice in (("FL", 0.75), ("low", 0.5)) for k in range(3)]
    outcome = paired_tests(rows, "FL")["low"]
    assert (outcome.t, outcome.p, outcome.difference) == (math.inf, 0.0, 0.25)
    shown = volume_page_tables.test_table({"Overall": {"low": outcome}}, "FL")
    assert "inf</td>" in shown and "nan" not in shown
    study = VolumeStudy(Path("x"), {}, [], [], {"runs": {}})
    results = VolumeResults(study, "FL")
    results.__dict__["tests"] = {("sites", 0): {"Overall": {"low": outcome}}}
    (told,) = json.loads(json.dumps(report_dict(results), allow_nan=False))["tests"]
    assert told["t"] is None and told["p"] == 0 and told["difference"] == 0.25


@pytest.mark.parametrize(
    ("name", "value"), [("spacing", 3.0), ("interpolation", "spline"), ("patch", [16, 16, 32]), ("overlap", 0.25)]
)
def test_an_ensemble_sees_volumes_in_one_way(name: str, value: object, tmp_path: Path) -> None:
    files = [
        load_model(toy_segmenter(tmp_path / "a.pt")),
        load_model(toy_segmenter(tmp_path / "b.pt", **{name: value})),
    ]
    with pytest.raises(UserError, match=f"b.pt has another {name} than .*a.pt: average"):
        score_ensemble("x", files, {"north": tmp_path / "north"})
    with pytest.raises(UserError, match=f"b.pt has another {name} than .*a.pt"):
        open_segmenter(files)


def test_an_ensemble_has_one_network() -> None:
    def file(path: str, network: str) -> SimpleNamespace:
        return SimpleNamespace(
            path=path, build=lambda: (make_method("prostate_ahnet", None, {"network": network}), None)
        )

    assert len(build_alike([file("a.pt", "ahnet"), file("b.pt", "ahnet")])) == 2
    with pytest.raises(UserError, match=r"b.pt has another network than a.pt: average models trained alike"):
        build_alike([file("a.pt", "ahnet"), file("b.pt", "unet_tiny")])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (scores("a", "x", [0.5, 0.6]), "no score of the federated model 'fl'"),
        ([*scores("a", "x", [0.5]), *scores("fl", "x", [0.5])], "two or more"),
        ([*scores("a", "x", [0.5, 0.6]), *scores("fl", "y", [0.5, 0.6])], "2 and 2 cases, 0 of them the same"),
        ([*scores("fl", "x", [0.5, 0.6]), *scores("fl", "x", [0.5])], "case 0 of x is scored twice"),
    ],
)
def test_what_cannot_be_compared_is_refused(rows: list[CaseDice], message: str) -> None:
    with pytest.raises(UserError, match=message):
        paired_tests(rows, "fl")


def test_the_table_marks_what_is_significantly_lower() -> None:
    near = [0.80 + 0.01 * i for i in range(8)]
    rows = []
    for site in ("x", "y", "challenge"):
        rows += scores("fl", site, near)
        rows += scores("low", site, [v - 0.1 - 0.001 * i for i, v in enumerate(near)])
        rows += scores("alike", site, [v + (-1) ** i * 0.01 for i, v in enumerate(near)])
    lines = cross_site_table(rows, "fl", ["challenge"]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["model", "x (n=8)", "y (n=8)", "Overall (n=16)", "challenge (n=8)"]
    mean, sd = np.mean(near), np.std(near, ddof=1)
    assert [row[0] for row in cells[2:]] == ["alike", "low", "fl"]
    assert cells[4][1:3] == [f"{mean:.3f} ± {sd:.3f}"] * 2
    assert [cell.endswith("*") for cell in cells[3]] == [False, False, False, True, True]
    assert not any("*" in cell for cell in cells[2] + cells[4])


def test_the_published_overall_is_that_of_its_sites() -> None:
    for sites in PUBLISHED.values():
        assert np.mean([sites[s][0] for s in ("NCI", "SUNY", "UCLA")]) == pytest.approx(sites["Overall"][0], abs=6e-4)
    assert len(re.findall(r"\*", published_table())) == 6
