"""FedDyS: which images an epoch keeps, what a site weighs, and the federated averaging that is left without both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core_toys import settings, toy_data
from heterosync.errors import ContributionRefused, UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.initial import initial_state
from heterosync.federation.server import Server
from heterosync.methods import make_method
from heterosync.methods.feddys import kept, sampling_scores
from heterosync.methods.labels import equitability
from heterosync.training import LocalTrainer
from method_toys import last, same


def test_the_worked_example() -> None:
    labels = np.array([0] * 6 + [1] * 2)
    top = np.array([0.55, 0.60, 0.70, 0.80, 0.90, 0.99, 0.58, 0.95])
    scores = sampling_scores(np.where(labels == 1, top, 1 - top), labels, minority=1)
    assert np.round(scores, 4).tolist() == [1.1052, 1.2214, 1.4918, 1.8221, 2.2255, 2.6645, 1.0833, 1.5683]
    assert scores.mean() == pytest.approx(1.6478, abs=5e-5)
    chosen = np.flatnonzero(kept(scores, None))
    assert chosen.tolist() == [0, 1, 2, 6, 7]
    assert equitability(np.bincount(labels[chosen], minlength=2)) == pytest.approx(0.971, abs=5e-4)


def test_only_the_minority_is_halved_whatever_the_model_says_of_it() -> None:
    labels = np.array([0, 0, 1])
    p = np.array([0.1, 0.9, 0.1])  # of label 1: the model is as sure of a wrong label as of a right one
    assert np.allclose(np.log(sampling_scores(p, labels, minority=1)), [0.8, 0.8, 0.4])
    assert np.allclose(np.log(sampling_scores(p, labels, minority=0)), [0.4, 0.4, 0.8])
    assert np.allclose(np.log(sampling_scores(p, labels, minority=None)), [0.8, 0.8, 0.8])


def test_equitability() -> None:
    assert equitability(np.array([5, 5])) == pytest.approx(1.0)
    assert equitability(np.array([1, 9])) == pytest.approx(0.469, abs=5e-4)
    assert equitability(np.array([0, 10])) == 0.0


@pytest.mark.parametrize("quantile", [0.01, 0.05, 0.15, 1.0])
def test_a_quantile_keeps_at_least_one(quantile: float) -> None:
    scores = np.exp(np.random.default_rng(0).random(40))
    stays = kept(scores, quantile)
    assert 1 <= stays.sum() <= max(1, np.ceil(40 * quantile)) and scores[stays].max() <= scores[~stays].min(initial=9)


# -- at a site ---------------------------------------------------------------------------------------------------------


def played(counts=(20, 20), **changes):
    """A site that trains one round, and the rows it kept, epoch by epoch."""
    training = settings(local_epochs=changes.pop("local_epochs", 4), patience=99, lr=3e-3)
    method = make_method("feddys", changes, training)
    site = LocalTrainer(method, toy_data(counts), "site-a")
    seen: list[np.ndarray] = []
    chosen = site._examples.chosen
    site._examples.chosen = lambda round_, epoch, rows: (seen.append(rows), chosen(round_, epoch, rows))[1]
    return site, site.train_round(0), seen


def test_the_kept_images_only_get_fewer_within_a_round_and_all_come_back() -> None:
    site, result, seen = played()
    assert len(seen) >= 2 and len(seen[0]) < 24
    for before, after in zip(seen, seen[1:], strict=False):
        assert set(after) <= set(before)
    assert len(seen[-1]) < len(seen[0])
    labels = site.data.primary.labels[site.data.splits["train"]]
    counts = np.bincount(labels[seen[-1]], minlength=2)
    assert result.metrics["label_balance"] == pytest.approx(equitability(counts))
    began = len(seen)
    site.train_round(1)
    assert len(seen[began]) > len(seen[began - 1])


def test_a_site_of_one_class_reports_no_balance() -> None:
    _, result, _ = played((20, 0))
    assert result.metrics["label_balance"] == 0.0 and result.metrics["steps"] > 0


def test_a_round_ends_when_one_image_is_left() -> None:
    _, result, seen = played(th_mode="percentage", th=0.15, local_epochs=5)
    assert [len(rows) for rows in seen] == [4, 1] and len(result.epochs) == 1
    assert result.metrics["label_balance"] == 0.0  # of one image
    site, result, seen = played(th_mode="percentage", th=0.01)
    assert [len(rows) for rows in seen] == [1] and result.metrics["steps"] == 0
    initial = site._initial_model().state_dict()
    assert all(torch.equal(result.state[name], initial[name]) for name in initial)


def test_scoring_leaves_the_model_in_training_mode_as_it_was() -> None:
    site, _, _ = played()
    before = {name: value.clone() for name, value in site.model.state_dict().items()}
    site.model.train()
    site.method.round_start(site.model, {}, site._examples)
    batches = site.method.batches(site.model, site._examples, 0, 0)
    next(batches)
    assert site.model.training
    assert all(torch.equal(before[name], value) for name, value in site.model.state_dict().items())


# -- at the server -----------------------------------------------------------------------------------------------------


def fused(balances: list[float], method_settings: dict | None = None) -> tuple[float, float]:
    """The fused value of a weight and of a BatchNorm statistic, which site i sent as i."""
    method = make_method("feddys", method_settings, settings())
    state = initial_state(method)
    server = Server(method, state)
    server.start(0, state)
    for i, balance in enumerate(balances):
        sent = {name: torch.full_like(value, i) for name, value in state.items()}
        server.accept(Contribution(f"site-{i}", "feddys", 0, sent, {"label_balance": balance}, 10 * (i + 1)))
    result = server.result()
    return float(result["net.fc.weight"][0, 0]), float(result["net.bn1.running_mean"][0])


def test_sites_weigh_by_balance_and_a_site_of_one_class_nothing() -> None:
    assert fused([0.5, 0.25, 0.25]) == pytest.approx((0.75, 1.0))
    assert fused([0.0, 1.0])[0] == 1.0 and fused([1.0, 0.0])[0] == 0.0
    assert fused([0.0, 0.0]) == (0.5, 0.5)  # nobody has any: all count alike
    assert fused([1.0, 0.0], {"bn_buffers": "weighted"}) == (0.0, 0.0)
    assert fused([1.0, 0.0], {"weighting": "samples", "bn_buffers": "weighted"}) == pytest.approx((2 / 3, 2 / 3))


def test_a_site_that_keeps_its_balance_to_itself_is_refused_by_name() -> None:
    method = make_method("feddys", None, settings())
    state = initial_state(method)
    server = Server(method, state)
    server.start(0, state)
    with pytest.raises(ContributionRefused, match="site site-a.*it reports no label_balance"):
        server.accept(Contribution("site-a", "feddys", 0, state, {}, 10))


# -- whole runs --------------------------------------------------------------------------------------------------------


def test_without_its_terms_it_is_federated_averaging(smoke_run) -> None:
    off = {"th_mode": "none", "weighting": "samples", "bn_buffers": "weighted"}
    plain = smoke_run("fedavg", local_epochs=2)
    assert same(last(smoke_run("feddys", off, local_epochs=2)), last(plain))
    for term in ({"th_mode": "mean"}, {"weighting": "label_balance"}, {"bn_buffers": "equal"}):
        changed = smoke_run("feddys", {**off, **term}, local_epochs=2)
        # both toy sites are balanced: their weights by balance are equal, by images they are not
        assert not same(last(changed), last(plain))


def test_settings() -> None:
    with pytest.raises(UserError, match="feddys setting 'th' counts only with th_mode=percentage"):
        make_method("feddys", {"th": 0.05}, settings())
    with pytest.raises(UserError, match="feddys setting 'th' is 2.0"):
        make_method("feddys", {"th_mode": "percentage", "th": 2.0}, settings())
