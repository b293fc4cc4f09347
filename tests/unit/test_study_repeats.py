"""Every method over its repeats: measures by hand, the paired test against scipy's one-sample test."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy.stats import t as student
from scipy.stats import ttest_1samp
from sklearn.metrics import roc_auc_score

from heterosync.study.evidence.outcomes import by_series, read_study
from heterosync.study.evidence.repeats import LAST_ROUNDS, over_anchors, over_repeats
from heterosync.study.evidence.statistics import paired_test
from heterosync.study.evidence.tables import repeats_csv
from study_data import fake_study

SITES = {"hospitals": {"a": (12, 10), "b": (14, 14), "none": (9, 0), "unseen": (8, 20)}}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repeats") / "study"
    return read_study(fake_study(folder, ("hsl", "fedavg", "local"), ("hospitals",), 4, sites=SITES))


def of(study, label: str, measure: str):
    (found,) = [one for one in over_repeats(study, "hsl") if (one.label, one.measure) == (label, measure)]
    return found


def test_measures_of_a_repeat(study):
    run = by_series(study)["hospitals", "all"]["fedavg"][2]
    each = [run.tests[site]["auc"] for site in ("a", "b")]  # as the run itself recorded them; "none" has no AUC
    assert of(study, "fedavg", "sites").values[2] == pytest.approx(np.mean(each))
    assert of(study, "fedavg", "worst").values[2] == pytest.approx(min(each))
    rounds = sorted({row[0] for row in run.history})
    last = [
        np.mean([value for round_, _, metric, value in run.history if (round_, metric) == (r, "val_auc_received")])
        for r in rounds[-LAST_ROUNDS:]
    ]
    assert of(study, "fedavg", "fluctuation").values[2] == pytest.approx(np.std(last, ddof=1))


def test_the_unseen_images_of_methods_with_a_model_per_site(study):
    run = by_series(study)["hospitals", "all"]["local"][1]
    each = [roc_auc_score(scores.labels, scores.scores) for scores in run.unseen.values()]
    assert len(each) == 3 and of(study, "local", "unseen").values[1] == pytest.approx(np.mean(each))


def test_the_paired_test_is_students(study):
    ours, theirs = of(study, "hsl", "sites"), of(study, "local", "sites")
    assert ours.test is None  # not against itself
    d = np.array([ours.values[r] - theirs.values[r] for r in range(4)])
    half = student.ppf(0.975, 3) * d.std(ddof=1) / 2
    test = theirs.test
    assert test.n == 4 and test.difference == pytest.approx(d.mean())
    assert (test.low, test.high) == (pytest.approx(d.mean() - half), pytest.approx(d.mean() + half))
    assert test.p == pytest.approx(ttest_1samp(d, 0).pvalue)
    assert ours.sd == pytest.approx(np.std(list(ours.values.values()), ddof=1))


def test_equal_differences_have_no_spread_to_test_by():
    """0.8 - 0.7 and 0.7 - 0.6 differ in the last bit."""
    ahead = paired_test([0.8, 0.7, 0.9], [0.7, 0.6, 0.8])
    assert (ahead.t, ahead.p, ahead.low) == (np.inf, 0.0, ahead.difference)
    assert (paired_test([0.6, 0.7], [0.7, 0.8]).t, paired_test([0.1, 0.2], [0.1, 0.2]).p) == (-np.inf, 1.0)


def test_the_table_has_a_row_for_every_method_and_measure(study):
    rows = list(csv.DictReader(repeats_csv(over_repeats(study, "hsl")).splitlines()))
    assert len(rows) == 12 and {row["reference"] for row in rows} == {"hsl"}
    row = next(row for row in rows if (row["label"], row["measure"]) == ("fedavg", "unseen"))
    assert float(row["reference_minus_label"]) == pytest.approx(of(study, "fedavg", "unseen").test.difference)
    assert not any("nan" in row.values() for row in rows)


def test_a_method_is_held_against_itself_under_another_anchor(tmp_path):
    """The pairs are repeats with the same images; scenarios that differ in more than their anchor are not compared."""
    names = ("plain", "noise", "small")
    sites = dict.fromkeys(names, SITES["hospitals"])
    made = read_study(fake_study(tmp_path / "study", ("hsl", "fedavg"), names, 3, sites=sites))
    assert over_anchors(made) == []  # three tables, none twice
    for entry in made.plan["scenarios"]:
        entry["scenario"] = "sites.csv"
    assert over_anchors(made) == []  # one table, one anchor task
    made.plan.update(scale=0.2, anchor={"kind": "synthetic"})
    made.plan["scenarios"][1]["anchor"] = {"kind": "synthetic"}
    assert over_anchors(made) == []  # the plan's own, written once more
    made.plan["scenarios"][1]["scale"] = 0.2  # likewise
    made.plan["scenarios"][1]["anchor"] = {"control": "noise_pixels"}
    made.plan["scenarios"][2]["anchor"] = {"control": "noise_pixels"}
    made.plan["scenarios"][2]["scale"] = 0.5
    found = {(one.scenario, one.label, one.measure): one for one in over_anchors(made)}
    assert {scenario for scenario, _, _ in found} == {"noise"} and len(found) == 8
    one = found["noise", "hsl", "sites"]
    here, there = (
        [
            np.mean([run.tests[site]["auc"] for site in ("a", "b")])
            for _, run in sorted(by_series(made)[name, "all"]["hsl"].items())
        ]
        for name in ("noise", "plain")
    )
    assert one.reference == "plain" and one.test.difference == pytest.approx(np.mean(there) - np.mean(here))
    assert one.test.p == pytest.approx(ttest_1samp(np.subtract(there, here), 0).pvalue)


def test_too_few_rounds_have_no_fluctuation(tmp_path):
    """What is received in a round, and the last fusion, are one value each."""
    made = read_study(fake_study(tmp_path / "study", ("hsl",), ("hospitals",), 2, sites=SITES, rounds=LAST_ROUNDS - 2))
    assert of(made, "hsl", "fluctuation").mean is None and of(made, "hsl", "sites").mean is not None
