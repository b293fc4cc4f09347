"""No-SAT: HSL's network without the shared anchor task (paper, Ablation)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from heterosync.methods.base import COMMON_LEAVES, Method, Partner
from heterosync.methods.paired import MMoESettings, paired_network, paired_predict, unpaired_loss
from heterosync.training import Batch


@dataclass(frozen=True)
class NoSATSettings(MMoESettings):
    what: ClassVar[str] = "no_sat"


class NoSAT(Method):
    """Hu et al. 2025, ablation: the two-task network stays, the anchor task is gone.

        site k:  w_k <- local epochs of BCE(p_1(x, x), y) from w        server:  w <- (1/K) sum_k w_k

    What enters the second branch is not stated; here the image itself [R]. Gate, skip and tower of task 2 get no
    gradient, its encoder gets one through the experts. Sent: all tensors, 90.6 MiB per round with ResNet18. An epoch
    has n_k items; HSL's has max(n_k, anchor): with `match_steps` this is the decisive control.

    Degenerates: its loss is HSL's with `loss_weights` (1, 0) and every image as its own partner.
    """

    name = "no_sat"
    title = "HSL without anchor task"
    status = "reconstruction"
    citation = "Hu et al., Nat. Commun. 16, 9416 (2025), ablation No-SAT"
    leaves = (
        "W1: all tensors of the two-task network (weights, BatchNorm statistics and counters)",
        *COMMON_LEAVES,
    )
    Settings = NoSATSettings
    settings: NoSATSettings

    def network(self, weights: str) -> nn.Module:
        return paired_network(self.settings, self.training, weights)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return unpaired_loss(model, batch)

    def predict(self, model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
        return paired_predict(model, images, "self")
