"""Clipped and noised updates, and what they guarantee (docs/privacy.md says for whom and against whom).

A site sends received + clip(trained - received) + noise. The noise is Gaussian with standard deviation `noise * clip`
in every element, so that one answer is a Gaussian mechanism of noise multiplier `noise`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch
from scipy.special import log_ndtr
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def noisy_state(
    received: Mapping[str, Tensor],
    trained: Mapping[str, Tensor],
    clip: float,
    noise: float,
    variances: Collection[str] = (),
) -> tuple[dict[str, Tensor], float]:
    """(the state to send, the L2 norm of the update before clipping), over all floating-point tensors together.

    variances: tensors that may not become negative. Integer counters are sent as they are. The generator is seeded by
    the operating system, never by a seed of the job, which everybody knows. Without noise and clipping the state is
    `trained`, to the bit. Raises `KeyError` when a tensor was not received, `ValueError` when the norm is not finite.
    """
    floats = [name for name, value in trained.items() if value.is_floating_point()]
    squares = (torch.linalg.vector_norm(_update(received, trained, name)).item() ** 2 for name in floats)
    norm = math.sqrt(math.fsum(squares))
    if not math.isfinite(norm):
        raise ValueError("the update is not finite")
    if norm <= clip and noise == 0:
        return dict(trained), norm
    scale = min(1.0, clip / norm) if norm else 1.0
    random = np.random.Generator(np.random.Philox())  # 128 bits of the operating system's entropy
    state = dict(trained)
    for name in floats:
        value = received[name].double() + _update(received, trained, name) * scale
        if noise:
            value += torch.from_numpy(random.standard_normal(value.numel(), np.float32)).view_as(value) * (noise * clip)
        if name in variances:
            value.clamp_(min=0.0)
        state[name] = value.to(trained[name].dtype)
    return state, norm


def _update(received: Mapping[str, Tensor], trained: Mapping[str, Tensor], name: str) -> Tensor:
    return trained[name].detach().cpu().double() - received[name].detach().cpu().double()


def running_variances(model: nn.Module) -> frozenset[str]:
    """Names of the state tensors that hold running variances of normalisation layers."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, _NormBase)]
    return frozenset(f"{name}.running_var" for name, layer in layers if layer.running_var is not None)


def delta_of(epsilon: float, noise: float, rounds: int) -> float:
    """Smallest delta such that `rounds` answers of one site are (epsilon, delta)-differentially private.

    The composition of Gaussian mechanisms is one Gaussian mechanism with mu = sqrt(rounds) / noise (Dong, Roth, Su
    2022, corollary 2); its curve is delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) (Balle, Wang 2018, theorem
    8). It is exact, not a bound. Neighbours: the site with all its data, and a site that sends back what it received.
    """
    mu = math.sqrt(rounds) / noise
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = float(log_ndtr(-mu / 2 - epsilon / mu)) + epsilon
    return math.exp(first) * -math.expm1(second - first) if second < first else 0.0


def epsilon_of(delta: float, noise: float, rounds: int) -> float:
    """Smallest epsilon for a delta (see `delta_of`); infinite without noise."""
    if noise == 0:
        return math.inf
    low, high = 0.0, 1.0
    if delta_of(low, noise, rounds) <= delta:
        return 0.0
    while delta_of(high, noise, rounds) > delta:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, noise, rounds) > delta else (low, middle)
    return high
