"""FedCOME: the corrected updates, their guarantees, and the federated averaging that is left without conflicts."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from core_toys import settings
from heterosync.errors import UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.initial import initial_state
from heterosync.federation.server import Server
from heterosync.methods import fedcome, make_method
from heterosync.methods.fedcome import corrections
from method_toys import last, same
from toys import toy_site

PARAMETER = "net.fc.weight"


def corrected(updates: np.ndarray) -> np.ndarray:
    """The updates (K, d) as the server bends them."""
    return updates + corrections(updates @ updates.T) @ updates


def served(updates: np.ndarray, samples: list[int] | None = None, **changes) -> np.ndarray:
    """What the server adds to the classifier's weights, of which the sites changed the first ones by `updates`."""
    method = make_method("fedcome", changes, settings())
    state = initial_state(method)
    server = Server(method, state)
    server.start(0, state)
    for i, update in enumerate(updates):
        sent = {name: value.clone() for name, value in state.items()}
        sent[PARAMETER][0, : len(update)] += torch.from_numpy(update).float()
        server.accept(Contribution(f"site-{i}", "fedcome", 0, sent, {}, samples[i] if samples else 10))
    result = server.result()
    assert all(torch.equal(result[name], state[name]) for name in state if name != PARAMETER)
    return (result[PARAMETER].double() - state[PARAMETER].double())[0, : updates.shape[1]].numpy()


def test_two_updates_worked_by_hand() -> None:
    updates = np.array([[1.0, 0.0], [-0.5, 1.0]])
    assert np.allclose(corrected(updates), [[0.8, 0.4], [0.0, 1.0]], atol=1e-12)
    step = served(updates)
    assert np.allclose(step, [0.4, 0.7], atol=1e-6)
    assert np.allclose(updates @ step, [0.4, 0.5], atol=1e-6)


@pytest.mark.parametrize("sites", [2, 5, 7])
def test_no_corrected_update_harms_a_site_and_each_is_the_nearest_such(sites: int) -> None:
    from scipy.optimize import minimize

    rng = np.random.default_rng(sites)
    updates = rng.normal(size=(sites, 30)) + np.outer(rng.choice([-1, 1], sites), rng.normal(size=30))
    products, bent = updates @ updates.T, corrected(updates)
    assert (products < 0).any()
    assert (bent @ updates.T).min() >= -1e-10 * np.trace(products)
    for i in range(sites):  # the paper's own programme, in its K variables
        found = minimize(
            lambda x, i=i: x @ products @ x - 2 * products[i] @ x,
            np.eye(sites)[i],
            jac=lambda x, i=i: 2 * (products @ x - products[i]),
            constraints={"type": "ineq", "fun": lambda x: products @ x, "jac": lambda x: products},
            method="SLSQP",
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert np.linalg.norm(found.x @ updates - bent[i]) < 1e-3 * np.linalg.norm(updates[i])


def test_the_mean_of_corrected_updates_harms_nobody_where_plain_averaging_does() -> None:
    rng = np.random.default_rng(0)
    way = rng.normal(size=40)
    updates = np.stack([way, -0.6 * way, 0.3 * way]) + 0.3 * rng.normal(size=(3, 40))
    assert (updates @ updates.mean(0)).min() < -1
    step = corrected(updates).mean(0)
    assert (updates @ step).min() >= -1e-8 * (step @ step)
    assert np.allclose(served(updates), step, atol=1e-5)


def test_without_conflict_it_is_federated_averaging() -> None:
    updates = np.array([[1.0, 0.0, 2.0], [0.0, 1.0, 0.5], [0.5, 0.5, 0.0]])
    assert not corrections(updates @ updates.T).any()
    samples = [10, 30, 60]
    plain = make_method("fedavg", None, settings())
    state = initial_state(plain)
    server = Server(plain, state)
    server.start(0, state)
    for i, update in enumerate(updates):
        sent = {name: value.clone() for name, value in state.items()}
        sent[PARAMETER][0, :3] += torch.from_numpy(update).float()
        server.accept(Contribution(f"site-{i}", "fedavg", 0, sent, {}, samples[i]))
    expected = (server.result()[PARAMETER].double() - state[PARAMETER].double())[0, :3].numpy()
    assert np.array_equal(served(updates, samples), expected)  # to the last bit


def test_the_order_of_sites_does_not_matter() -> None:
    updates = np.random.default_rng(3).normal(size=(3, 5))
    expected = corrected(updates).mean(0)
    for order in permutations(range(3)):
        assert np.allclose(corrected(updates[list(order)]).mean(0), expected, atol=1e-12)


def test_updates_of_no_length_or_one_direction_have_a_solution() -> None:
    assert not corrections(np.zeros((3, 3))).any()
    updates = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    assert np.allclose(corrected(updates), 0.0, atol=1e-9)  # opposite updates cancel


def test_a_failing_solver_leaves_the_update_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args):
        raise RuntimeError("Maximum number of iterations reached.")

    monkeypatch.setattr(fedcome, "nnls", fail)
    updates = np.array([[1.0, 0.0], [-0.5, 1.0]])
    assert np.array_equal(corrected(updates), updates)
    assert "FedCOME: an update stays as it is: Maximum number" in caplog.text


def test_the_clip_bounds_every_element() -> None:
    updates = np.array([[1.0, 0.0, 0.001], [0.9, 0.1, 0.001]])
    assert np.allclose(served(updates, clip=0.005), [0.005, 0.005, 0.001], atol=1e-6)
    with pytest.raises(UserError, match="fedcome setting 'clip' is -1"):
        make_method("fedcome", {"clip": -1.0}, settings())


def test_a_run_differs_from_federated_averaging_by_the_corrections_alone(
    smoke_run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert same(last(smoke_run("fedcome")), last(smoke_run("fedavg")))  # two sites that agree
    sites = {name: toy_site(tmp_path / name, (12, 12), signal=155) for name in ("site-a", "site-b")}
    manifest = sites["site-b"] / "manifest.csv"  # the same images, labelled the other way round
    rows = manifest.read_text().replace("abnormal", "both").replace("normal", "abnormal").replace("both", "normal")
    manifest.write_text(rows)
    step = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.0, "batch_size": 512, "balanced_sampler": False}
    bent, plain = (smoke_run(name, None, sites, **step) for name in ("fedcome", "fedavg"))
    assert not same(last(bent), last(plain))
    monkeypatch.setattr(fedcome, "corrections", np.zeros_like)
    assert same(last(smoke_run("fedcome", {"clip": 0.0}, sites, **step)), last(plain))


def test_sent_is_what_federated_averaging_sends() -> None:
    come, plain = (make_method(name, None, settings()) for name in ("fedcome", "fedavg"))
    model = come.build_model()
    assert come.returned_names(model) == plain.returned_names(model) == come.shared_names(model)
    assert come.scalars == () and come.individual and come.server_memory(("a", "b")) == {}
