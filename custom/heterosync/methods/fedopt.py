"""FedOpt with momentum: the server treats the mean change as a gradient (FedAvgM)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heterosync.methods.base import COMMON_LEAVES, Method, SampleWeights
from heterosync.training import setting


@dataclass(frozen=True)
class FedOptSettings(SampleWeights):
    what: ClassVar[str] = "fedopt"

    server_lr: float = setting(1.0, "[M] Hsu et al. 2019", low=1e-12)
    server_momentum: float = setting(0.9, "[M] Hsu et al. 2019", low=0.0, high=0.9999)


class FedOpt(Method):
    """Reddi et al., "Adaptive federated optimization", ICLR 2021, Algorithm 1 with SGD and momentum as the server's
    optimiser; Hsu et al. 2019 call it FedAvgM.

        D = sum_k (n_k / n) w_k - w        m <- beta m + D        w <- w + eta m

    over trainable parameters; BatchNorm statistics and counters are averaged. Sent: as FedAvg, 42.7 MiB per round with
    ResNet18; m stays at the server, in its model file. `fedadam` has the adaptive rules.

    Degenerates: with eta = 1 and beta = 0 into FedAvg.
    """

    name = "fedopt"
    title = "FedOpt (server momentum)"
    status = "exact"
    citation = "Reddi et al., ICLR 2021, arXiv 2003.00295; Hsu et al. 2019, arXiv 1909.06335"
    leaves = ("W1: all tensors of the classifier (weights, BatchNorm statistics and counters)", *COMMON_LEAVES)
    Settings = FedOptSettings
    settings: FedOptSettings

    def server_memory(self, sites: tuple[str, ...]) -> dict[str, Tensor]:
        model = self.build_model(weights="none")
        return {f"momentum.{name}": torch.zeros_like(value) for name, value in model.named_parameters()}

    def combine(
        self, sent: Mapping[str, Tensor], fused: dict[str, Tensor], memory: dict[str, Tensor], sites: int
    ) -> dict[str, Tensor]:
        state = dict(fused)
        for key, momentum in list(memory.items()):
            name = key.removeprefix("momentum.")
            old = sent[name].double()  # in float64 w + (mean - w) is the mean to the last bit
            step = fused[name].double() - old
            if self.settings.server_momentum:
                step = self.settings.server_momentum * momentum.double() + step
            memory[key] = step.to(momentum.dtype)
            state[name] = (old + self.settings.server_lr * step).to(fused[name].dtype)
        return state
