"""Metrics, intervals and tests of a study, against scikit-learn, SciPy and brute force."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, precision_score, recall_score, roc_auc_score, roc_curve

from heterosync.study.evidence import bootstrap as bootstrap_module
from heterosync.study.evidence.bootstrap import METRICS, Draws, bootstrap
from heterosync.study.evidence.statistics import (
    Scores,
    clusters_of,
    common_cases,
    interval,
    mean_sd,
    p_values,
    paired_bootstrap,
    pool,
    roc_band,
    site_metrics,
)
from heterosync.training.metrics import auc

SKLEARN = {
    "auc": roc_auc_score,
    "accuracy": lambda labels, scores: accuracy_score(labels, scores >= 0.5),
    "recall": lambda labels, scores: recall_score(labels, scores >= 0.5),
    "precision": lambda labels, scores: precision_score(labels, scores >= 0.5, zero_division=0),
}


def cases(n: int = 60, positives: int = 4, seed: int = 0, methods: int = 2) -> tuple[np.ndarray, list[np.ndarray]]:
    """Labels and scores with many ties: one decimal place."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([0, 1], [n - positives, positives]))
    return labels, [np.clip(rng.normal(0.4 + 0.2 * labels, 0.25), 0, 1).round(1) for _ in range(methods)]


def scored(ids: list[str], labels: list[int], scores: list[float], patients: list[str] | None = None) -> Scores:
    return Scores(np.array(ids), np.array(patients or [""] * len(ids)), np.array(labels), np.array(scores, dtype=float))


def drawn(labels: np.ndarray, resamples: int, seed: int) -> tuple[list[np.ndarray], float]:
    """The index stream, drawn one resample at a time, and the share of draws that lacked a class."""
    rng, kept, draws = np.random.default_rng(seed), [], 0
    while len(kept) < resamples:
        picks = rng.integers(0, len(labels), len(labels))
        draws += 1
        if len(set(labels[picks])) == 2:
            kept.append(picks)
    return kept, 1 - len(kept) / draws


def test_two_tailed_p_of_twelve_reversals_in_a_thousand():
    resampled = np.concatenate([np.full(10, -0.1), np.zeros(2), np.full(988, 0.1)])
    plain, smoothed = p_values(0.05, resampled)
    assert plain == 0.024
    assert smoothed == pytest.approx(0.02597, abs=5e-6)
    assert p_values(-0.05, -resampled) == (plain, smoothed)
    assert p_values(0.05, -resampled) == (1.0, 1.0)  # never above 1
    assert p_values(0.05, np.ones(1000)) == (0.0, pytest.approx(2 / 1001))


@pytest.mark.parametrize("positives", [2, 30, 57])
def test_every_resample_agrees_with_scikit_learn(positives):
    labels, scores = cases(positives=positives)
    found = bootstrap(labels, scores, METRICS, resamples=30, seed=7)
    picks, redraw_rate = drawn(labels, 30, 7)
    assert found["auc"].redraw_rate == pytest.approx(redraw_rate)
    for name, theirs in SKLEARN.items():
        expected = [[theirs(labels[rows], one[rows]) for one in scores] for rows in picks]
        np.testing.assert_allclose(found[name].values, expected, atol=1e-6)
        np.testing.assert_allclose(found[name].estimate, [theirs(labels, one) for one in scores], atol=1e-6)
    if positives == 2:
        assert redraw_rate > 0.02  # the redraw is exercised


def test_a_resample_without_a_positive_call_has_precision_zero():
    labels, scores = np.repeat([0, 1], [5, 15]), np.full(20, 0.2)
    scores[-1] = 0.8
    found = bootstrap(labels, [scores], ("precision",), resamples=40, seed=0)["precision"].values[:, 0]
    expected = [SKLEARN["precision"](labels[rows], scores[rows]) for rows in drawn(labels, 40, 0)[0]]
    assert list(found) == expected and set(expected) == {0.0, 1.0}


def test_auc_equals_brute_force_mann_whitney_and_the_metric_of_the_sites():
    labels, (scores, _) = cases(n=80, positives=11)
    found = bootstrap(labels, [scores], resamples=20, seed=1)["auc"]
    for value, rows in zip(found.values[:, 0], drawn(labels, 20, 1)[0], strict=True):
        positive, negative = scores[rows][labels[rows] == 1], scores[rows][labels[rows] == 0]
        wins = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative)
        assert value == wins / (len(positive) * len(negative))
        u = scipy.stats.mannwhitneyu(positive, negative).statistic
        assert value == pytest.approx(u / (len(positive) * len(negative)), abs=1e-12)
    assert found.estimate[0] == auc(labels, scores)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_change_nothing(monkeypatch, seed):
    labels, scores = cases(positives=1)
    whole = bootstrap(labels, scores, METRICS, resamples=100, seed=seed)
    assert whole["auc"].redraw_rate == pytest.approx(drawn(labels, 100, seed)[1]) and whole["auc"].redraw_rate > 0.2
    for rows in (1, 2, 3, 8):
        monkeypatch.setattr(bootstrap_module, "_COUNTS_AT_ONCE", rows * len(labels))
        for name, part in bootstrap(labels, scores, METRICS, resamples=100, seed=seed).items():
            np.testing.assert_array_equal(part.values, whole[name].values)
            assert part.redraw_rate == whole[name].redraw_rate


def test_comparison_is_the_percentiles_of_the_differences():
    labels, (a, b) = cases(n=100, positives=20)
    found = paired_bootstrap(labels, a, b, resamples=100, seed=5)
    differences = np.array(
        [roc_auc_score(labels[r], a[r]) - roc_auc_score(labels[r], b[r]) for r in drawn(labels, 100, 5)[0]]
    )
    assert found.difference == pytest.approx(roc_auc_score(labels, a) - roc_auc_score(labels, b))
    assert (found.ci_low, found.ci_high) == pytest.approx(tuple(np.percentile(differences, [2.5, 97.5])))
    against = (np.abs(differences) < 1e-12) | (np.sign(differences) != np.sign(found.difference))
    assert found.p == pytest.approx(min(1, 2 * against.sum() / 100))
    assert (found.n, found.n_positive, found.units, found.positive_units, found.resamples) == (100, 20, 100, 20, 100)
    assert paired_bootstrap(labels, a, b, resamples=100, seed=5) == found
    assert paired_bootstrap(labels, a, b, resamples=100, seed=6) != found


def test_swapping_the_methods_mirrors_the_comparison():
    labels, (a, b) = cases(n=100, positives=20)
    one, other = paired_bootstrap(labels, a, b), paired_bootstrap(labels, b, a)
    assert (one.p, one.p_smoothed, one.estimate_a) == (other.p, other.p_smoothed, other.estimate_b)
    assert (one.difference, one.ci_low, one.ci_high) == pytest.approx(
        (-other.difference, -other.ci_high, -other.ci_low)
    )


def test_equal_methods_do_not_differ():
    labels, (scores, _) = cases()
    found = paired_bootstrap(labels, scores, scores.copy())
    assert (found.difference, found.ci_low, found.ci_high, found.p, found.p_smoothed) == (0, 0, 0, 1, 1)


def test_interval_agrees_with_scipy():
    labels, (scores, _) = cases(n=200, positives=60, seed=2)
    ours = interval(labels, scores, resamples=2000, seed=0)
    theirs = scipy.stats.bootstrap(
        (labels, scores),
        auc,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.012)
    assert ours.estimate == auc(labels, scores)


def test_clusters_are_drawn_whole():
    labels, (a, b) = cases(n=50, positives=12)
    ids = np.array([f"{i:03d}" for i in range(50)])
    single = paired_bootstrap(labels, a, b)
    five = [np.tile(values, 5) for values in (labels, a, b)]
    copies = paired_bootstrap(*five, clusters=np.tile(ids, 5))
    assert (copies.ci_low, copies.ci_high, copies.p) == (single.ci_low, single.ci_high, single.p)
    assert (copies.n, copies.units, copies.positive_units) == (250, 50, 12)
    naive = paired_bootstrap(*five)  # takes five copies for five cases
    assert naive.ci_high - naive.ci_low < 0.6 * (single.ci_high - single.ci_low)


def test_unknown_patients_stand_for_themselves():
    part = scored(["a", "b", "c", "d"], [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4], ["p", "p", "", "c"])
    assert clusters_of(part, "case") is None
    assert len(set(clusters_of(part, "image"))) == 4
    assert len(set(clusters_of(part, "patient"))) == 3  # patient c is not image c
    with pytest.raises(ValueError, match="unknown unit hospital"):
        clusters_of(part, "hospital")


def test_resamples_without_a_positive_are_counted():
    labels = np.zeros(4279, dtype=int)
    labels[:2] = 1
    draws = Draws(labels, 1000, 0)
    assert sum(counts[:, :2].any(axis=1).sum() for counts in draws) == 1000
    assert draws.redraw_rate == pytest.approx(np.exp(-2), abs=0.04)


def test_five_repeats_of_the_rare_disease_region():
    """5 x 4279 cases, 10 positive: nothing is left to chance in the redraw, and it takes seconds."""
    rng = np.random.default_rng(0)
    labels = np.zeros(5 * 4279, dtype=int)
    labels[rng.choice(len(labels), 10, replace=False)] = 1
    scores = rng.normal(1.2 * labels, 1)
    found = paired_bootstrap(labels, 1 / (1 + np.exp(-scores)), rng.random(len(labels)))
    assert found.redraw_rate < 0.003
    assert found.estimate_a == pytest.approx(roc_auc_score(labels, scores))
    assert found.ci_high - found.ci_low > 0.1  # ten positives tell little


def test_coverage_of_the_interval_and_size_of_the_test():
    rng, d, n = np.random.default_rng(0), 1.0, 80
    truth = scipy.stats.norm.cdf(d / np.sqrt(2))
    labels = np.repeat([0, 1], n // 2)
    covered = rejected = 0
    for trial in range(200):
        shared = rng.normal(d * labels, 0.7)
        a, b = (shared + rng.normal(0, np.sqrt(1 - 0.7**2), n) for _ in range(2))
        resampled = bootstrap(labels, [a, b], resamples=200, seed=trial)["auc"]
        low, high = np.percentile(resampled.values[:, 0], [2.5, 97.5])
        covered += low <= truth <= high
        difference = resampled.estimate[0] - resampled.estimate[1]
        rejected += p_values(difference, resampled.values[:, 0] - resampled.values[:, 1])[0] < 0.05
    assert 0.89 <= covered / 200 <= 0.99
    assert 0.01 <= rejected / 200 <= 0.11


def test_a_difference_that_is_there_is_found():
    rng = np.random.default_rng(1)
    labels = np.repeat([0, 1], 150)
    found = paired_bootstrap(labels, rng.normal(2 * labels, 1), rng.normal(0.5 * labels, 1))
    assert found.p == 0 and found.p_smoothed == pytest.approx(2 / 1001)
    assert found.ci_low > 0


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_auc(label):
    labels, scores = np.full(12, label), np.linspace(0, 1, 12)
    found = paired_bootstrap(labels, scores, scores[::-1])
    assert (found.estimate_a, found.difference, found.ci_low, found.p, found.p_smoothed) == (None,) * 5
    assert (found.n, found.n_positive, found.redraw_rate) == (12, 12 * label, 0)
    assert interval(labels, scores).estimate is None
    assert roc_band(labels, scores) is None
    accuracy = paired_bootstrap(labels, scores, np.full(12, 0.9), metric="accuracy")
    assert accuracy.estimate_a == 0.5 and accuracy.p is not None
    recall = paired_bootstrap(labels, scores, scores, metric="recall")
    assert recall.estimate_a == (0.5 if label else None)


def test_models_of_one_method_are_averaged_metric_by_metric():
    labels, columns = cases(methods=4, positives=20)
    found = bootstrap(labels, [columns[0], np.stack(columns[1:])], ("auc",), resamples=50)["auc"]
    each = bootstrap(labels, columns, ("auc",), resamples=50)["auc"]
    np.testing.assert_allclose(found.values[:, 1], each.values[:, 1:].mean(axis=1))
    np.testing.assert_array_equal(found.values[:, 0], each.values[:, 0])
    assert found.estimate[1] == pytest.approx(each.estimate[1:].mean())


def test_roc_band_is_the_mean_of_scikit_learns_curves():
    labels, (scores, _) = cases(n=70, positives=15)
    band = roc_band(labels, scores, resamples=60, seed=4, points=21)
    curves = []
    for rows in drawn(labels, 60, 4)[0]:
        fpr, tpr, _ = roc_curve(labels[rows], scores[rows], drop_intermediate=False)
        curves.append(np.interp(band.fpr, fpr, tpr))
        curves[-1][0] = 0.0
    np.testing.assert_allclose(band.tpr, np.mean(curves, axis=0), atol=1e-9)
    np.testing.assert_allclose(band.low, np.percentile(curves, 2.5, axis=0), atol=1e-9)
    np.testing.assert_allclose(band.high, np.percentile(curves, 97.5, axis=0), atol=1e-9)
    assert band.tpr[0] == 0 and band.tpr[-1] == 1


def test_site_metrics_agree_with_scikit_learn():
    labels, (scores, _) = cases(positives=20)
    found = site_metrics(scored([str(i) for i in range(60)], list(labels), list(scores)))
    for name, theirs in SKLEARN.items():
        assert found[name] == pytest.approx(theirs(labels, scores))
    assert (found["n"], found["n_positive"], found["n_called"]) == (60, 20, (scores >= 0.5).sum())


def test_site_metrics_where_they_are_not_defined():
    none_called = site_metrics(scored(["a", "b"], [0, 1], [0.1, 0.2]))
    assert (none_called["precision"], none_called["recall"], none_called["n_called"]) == (0.0, 0.0, 0)
    no_positive = site_metrics(scored(["a", "b"], [0, 0], [0.1, 0.7]))
    assert (no_positive["auc"], no_positive["recall"], no_positive["precision"]) == (None, None, 0.0)
    assert (no_positive["n"], no_positive["n_positive"], no_positive["accuracy"]) == (2, 0, 0.5)


def test_mean_and_sd_over_the_defined_repeats():
    assert mean_sd([0.8, None, 0.9]) == (pytest.approx(0.85), pytest.approx(np.std([0.8, 0.9], ddof=1)), 2)
    assert mean_sd([0.8]) == (0.8, None, 1)
    assert mean_sd([None]) == (None, None, 0)


def test_pooling_keeps_every_repeat_of_a_case():
    both = pool([scored(["a", "b"], [0, 1], [0.1, 0.2]), scored(["b", "c"], [1, 0], [0.3, 0.4])])
    assert list(both.ids) == ["a", "b", "b", "c"] and list(both.scores) == [0.1, 0.2, 0.3, 0.4]


def test_cases_are_paired_by_repeat_and_id():
    one = {0: scored(["b", "a", "c"], [1, 0, 1], [0.2, 0.1, 0.3]), 1: scored(["a"], [0], [0.4])}
    other = {0: scored(["a", "c", "d"], [0, 1, 1], [0.9, 0.8, 0.7]), 2: scored(["a"], [0], [0.6])}
    (ours, theirs), left_out = common_cases([one, other])
    assert list(ours.ids) == list(theirs.ids) == ["a", "c"]
    assert list(ours.scores) == [0.1, 0.3] and list(theirs.scores) == [0.9, 0.8]
    assert left_out == ["2 repeats (r1, r2) not in all", "r0: 2 cases (b, d) not in all"]


def test_a_case_with_two_labels_is_not_paired():
    one, other = ({0: scored(["a", "b"], [0, label], [0.1, 0.2])} for label in (0, 1))
    (ours, _), left_out = common_cases([one, other])
    assert list(ours.ids) == ["a"] and left_out == ["r0: 1 case (b) with different labels"]


def test_nothing_in_common_gives_empty_pools():
    (ours, theirs), left_out = common_cases([{0: scored(["a"], [0], [0.1])}, {1: scored(["a"], [0], [0.1])}])
    assert len(ours) == len(theirs) == 0 and left_out == ["2 repeats (r0, r1) not in all"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([0, 1, 2])}, "labels must be"),
        ({"labels": np.array([], dtype=int)}, "labels must be"),
        ({"scores_b": np.array([0.1, 0.2])}, "3 scores"),
        ({"scores_a": np.array([0.1, np.nan, 0.3])}, "finite"),
        ({"clusters": np.array(["p", "q"])}, "clusters must be 3"),
        ({"resamples": 0}, "at least 1"),
        ({"metric": "f1"}, "unknown metric f1"),
    ],
)
def test_bad_input_is_refused(change, message):
    good = {"labels": np.array([0, 1, 1]), "scores_a": np.array([0.1, 0.2, 0.3]), "scores_b": np.array([0.3, 0.2, 0.1])}
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(**{**good, **change})
