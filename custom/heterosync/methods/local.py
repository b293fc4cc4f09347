"""Local learning: every site trains alone, nothing is exchanged (paper, Real-world validation)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from heterosync.methods.base import COMMON_LEAVES, Partner
from heterosync.methods.paired import Paired, PairedSettings, paired_loss, paired_network
from heterosync.training import Batch, TrainingSettings, setting


@dataclass(frozen=True)
class LocalSettings(PairedSettings):
    """`network` "mmoe" is HSL without exchange, anchor task included; without it the MMoE's settings are refused."""

    what: ClassVar[str] = "local"

    network: str = setting("classifier", "[R] the paper does not name its network", choices=("classifier", "mmoe"))

    def idle(self) -> dict[str, str]:
        return {} if self.network == "mmoe" else {item.name: "network=mmoe" for item in fields(PairedSettings)}


class Local(Paired):
    """Each site for itself: the lower reference of every comparison.

        site k:  w_k <- local epochs of BCE from w_k, the best snapshot of the round before

    Sent: no tensor. All sites start from the same initial values.

    Degenerates: it is federated averaging with a single site.
    """

    name = "local"
    title = "Local learning"
    status = "exact"
    citation = "standard baseline; the paper does not name its network, plain ResNet18 is a reconstruction"
    leaves = COMMON_LEAVES
    weighting = "none"
    personal = True
    Settings = LocalSettings
    settings: LocalSettings

    def __init__(self, settings: LocalSettings | None = None, training: TrainingSettings | None = None):
        super().__init__(settings, training)
        self.uses_anchor = self.settings.network == "mmoe"

    def network(self, weights: str) -> nn.Module:
        return paired_network(self.settings, self.training, weights) if self.uses_anchor else super().network(weights)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return paired_loss(self.settings, model, batch) if self.uses_anchor else super().loss(model, batch)

    def predict(self, model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
        return super().predict(model, images, partner) if self.uses_anchor else torch.sigmoid(model(images))
