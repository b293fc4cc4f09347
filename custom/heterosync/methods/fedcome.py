"""FedCOME: the server bends each site's update as little as makes it harm no other site."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from heterosync.methods.answer import Answer, mean
from heterosync.methods.base import COMMON_LEAVES, Method, SampleWeights
from heterosync.training import setting

log = logging.getLogger("heterosync")


@dataclass(frozen=True)
class FedCOMESettings(SampleWeights):
    what: ClassVar[str] = "fedcome"

    clip: float = setting(0.0, "[M] 0: none; [C] 0.005 for each element of the mean, for its small steps", low=0.0)


class FedCOME(Method):
    """Zheng et al., "Federated learning via consensus mechanism on heterogeneous data: a new perspective on
    convergence", ICASSP 2024.

        site k:  w_k <- local epochs of BCE from w,   D_k = w_k - w
        server:  D'_i = argmin ||D - D_i||^2  over D = sum_j x_j D_j  with  <D, D_k> >= 0 for every k
                 w <- w + sum_i (n_i / n) D'_i

    over trainable parameters; BatchNorm statistics and counters are averaged [R]. D'_i = D_i + sum_j l_j D_j for
    the l >= 0 of least ||D_i + sum_j l_j D_j||: the dual of the paper's quadratic programme, a non-negative least
    squares problem in the K x K matrix of inner products, exact to rounding; l = 0 where no update stands at an obtuse
    angle to D_i. `clip` bounds what is added to each weight, and may break the angles [C]. The
    paper's sampler chooses among sites of which not all take part; here all do. Native recipe: SGD 0.05 without
    momentum, batches of 50, 1 epoch.

    The server must see each site's update: no secure aggregation. Sent: as FedAvg, 42.7 MiB per round with ResNet18.

    Degenerates: into FedAvg where no two updates stand at an obtuse angle.
    """

    name = "fedcome"
    title = "FedCOME"
    status = "exact"
    citation = "Zheng et al., ICASSP 2024, arXiv 2311.12358"
    leaves = ("W1: all tensors of the classifier (weights, BatchNorm statistics and counters)", *COMMON_LEAVES)
    Settings = FedCOMESettings
    settings: FedCOMESettings

    def fuse(
        self, sent: Mapping[str, Tensor], answers: Mapping[str, Answer], memory: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        names = [name for name, _ in self.build_model(weights="none").named_parameters()]

        def updates(name: str) -> Tensor:  # (K, elements), float64
            return torch.stack([(answer[name].double() - sent[name].double()).flatten() for answer in answers.values()])

        products = torch.zeros(len(answers), len(answers), dtype=torch.float64)
        for name in names:
            one = updates(name)
            products += one @ one.T
        weights = np.array([answer.weight for answer in answers.values()])
        mix = torch.from_numpy(weights + weights @ corrections(products.numpy()))
        state = {name: mean(answers, name) for name in sent}
        if self.settings.clip or not np.array_equal(mix, weights):
            for name in names:
                step = (mix @ updates(name)).view_as(sent[name])
                if self.settings.clip:
                    step = step.clamp(-self.settings.clip, self.settings.clip)
                state[name] = (sent[name].double() + step).to(sent[name].dtype)
        return state


def corrections(products: np.ndarray) -> np.ndarray:
    """Row i: the l >= 0 of D_i, from the inner products (K, K) of the updates; zeros where no solution is found."""
    added = np.zeros_like(products)
    scale = np.trace(products)
    if scale <= 0:
        return added
    values, vectors = np.linalg.eigh(products / scale)
    root = (vectors * np.sqrt(values.clip(min=0.0))).T  # root.T @ root = products / scale
    for i in np.flatnonzero((products < 0).any(axis=1)):
        try:
            added[i], _ = nnls(root, -root[:, i])
        except RuntimeError as error:
            log.warning("FedCOME: an update stays as it is: %s", error)
    return added
