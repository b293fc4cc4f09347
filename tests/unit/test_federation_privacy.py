"""Clipped and noised updates: the arithmetic, and the guarantee against computations that share nothing with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm as gaussian

from heterosync.federation.privacy import delta_of, epsilon_of, noisy_state, running_variances
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings
from toys import SMOKE


def states(size: int = 200_000) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A received and a trained state whose update has L2 norm 5 (3 in the weights, 4 in a BatchNorm statistic)."""
    received = {"w": torch.linspace(-1, 1, size), "bn.running_var": torch.zeros(4), "bn.steps": torch.tensor(7)}
    move = torch.zeros(size)
    move[0] = 3.0
    trained = {"w": received["w"] + move, "bn.running_var": torch.full((4,), 2.0), "bn.steps": torch.tensor(19)}
    return received, trained


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return math.sqrt(sum(float((a[n].double() - b[n].double()).square().sum()) for n in ("w", "bn.running_var")))


@pytest.mark.parametrize(("clip", "expected"), [(0.5, 0.5), (4.0, 4.0), (100.0, 5.0)])
def test_the_update_has_at_most_the_norm_of_the_clip(clip: float, expected: float) -> None:
    received, trained = states()
    sent, norm = noisy_state(received, trained, clip, 0.0)
    assert norm == pytest.approx(5.0, rel=1e-6)
    assert distance(sent, received) == pytest.approx(expected, rel=1e-5)
    direction = (sent["w"] - received["w"])[0] / (sent["bn.running_var"] - received["bn.running_var"])[0]
    assert float(direction) == pytest.approx(3 / 2, rel=1e-4)  # shortened, not bent


def test_without_noise_and_a_wide_clip_nothing_changes_to_the_bit() -> None:
    received, trained = states()
    sent, _ = noisy_state(received, trained, 1e9, 0.0)
    assert all(torch.equal(sent[name], trained[name]) for name in trained)


def test_the_noise_is_gaussian_with_its_standard_deviation_in_every_element() -> None:
    received, trained = states()
    clip, noise = 0.5, 0.8
    plain, _ = noisy_state(received, trained, clip, 0.0)
    sent, _ = noisy_state(received, trained, clip, noise)
    added = ((sent["w"] - plain["w"]) / (clip * noise)).numpy()
    n = len(added)
    assert abs(added.mean()) < 5 / math.sqrt(n) and abs(added.std() - 1) < 5 / math.sqrt(2 * n)
    assert np.mean(np.abs(added) < 1) == pytest.approx(0.6827, abs=0.006)
    assert sent["bn.steps"] == 19 and sent["w"].dtype == torch.float32


def test_the_noise_is_no_function_of_public_seeds() -> None:
    received, trained = states(1000)

    def seeded() -> torch.Tensor:
        torch.manual_seed(0)
        np.random.seed(0)
        return noisy_state(received, trained, 1.0, 1.0)[0]["w"]

    assert not torch.equal(seeded(), seeded())


def test_running_variances_stay_non_negative() -> None:
    received, trained = states()
    sent = [noisy_state(received, trained, 1.0, 5.0, {"bn.running_var"})[0]["bn.running_var"] for _ in range(20)]
    assert min(float(value.min()) for value in sent) == 0.0
    model = make_method("hsl", None, TrainingSettings.from_dict(SMOKE)).build_model()
    assert running_variances(model) == {name for name in model.state_dict() if name.endswith("running_var")} != set()


def test_an_update_that_is_not_finite_is_refused() -> None:
    received, trained = states()
    trained["w"][5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        noisy_state(received, trained, 1.0, 1.0)


@pytest.mark.parametrize(
    ("noise", "rounds", "epsilon"), [(1.0, 1, 1.0), (2.0, 20, 3.0), (8.0, 20, 0.5), (0.7, 5, 12.0)]
)
def test_delta_is_the_divergence_of_the_two_distributions(noise: float, rounds: int, epsilon: float) -> None:
    """delta = integral of max(0, p - e^eps q) over what `rounds` answers show: N(0, I) against N(1/noise, I), R^rounds.

    Along the line between the means that is one dimension with distance sqrt(rounds) / noise.
    """
    mu = math.sqrt(rounds) / noise
    border = epsilon / mu - mu / 2  # where log p/q = epsilon, for p = N(mu, 1), q = N(0, 1)
    p, q = gaussian(mu, 1), gaussian(0, 1)
    integral, _ = quad(lambda x: p.pdf(x) - math.exp(epsilon) * q.pdf(x), border + mu, mu + 40, limit=500)
    assert delta_of(epsilon, noise, rounds) == pytest.approx(integral, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("noise", "rounds"), [(0.5, 1), (1.0, 20), (4.0, 20), (10.0, 100)])
def test_epsilon_lies_below_the_renyi_bound_and_not_far(noise: float, rounds: int) -> None:
    """Renyi accounting (Mironov 2017): each answer costs alpha / (2 noise^2), costs add up, the best alpha is taken."""
    delta = 1e-5
    renyi = min(
        rounds * alpha / (2 * noise**2) + math.log(1 / delta) / (alpha - 1)
        for alpha in 1 + np.geomspace(1e-3, 1e3, 9999)
    )
    ours = epsilon_of(delta, noise, rounds)
    assert 0.75 * renyi < ours < renyi
    assert delta_of(ours, noise, rounds) == pytest.approx(delta, rel=1e-4)


def test_known_values_and_limits() -> None:
    assert epsilon_of(1e-5, 1.0, 1) == pytest.approx(4.377, abs=1e-3)  # Balle and Wang's algorithm for sigma = 1
    assert epsilon_of(1e-5, 0.0, 1) == math.inf
    assert epsilon_of(1e-5, 1e6, 1) == 0.0
    assert epsilon_of(1e-5, 0.01, 20) > 9e4  # no overflow
