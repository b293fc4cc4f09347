"""MOON: a contrastive term that draws features towards the global model's and away from the site's last ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cosine_similarity, softplus

from heterosync.methods.base import COMMON_LEAVES, Method, SampleWeights
from heterosync.models.encoder import features
from heterosync.training import Batch, Examples, setting


@dataclass(frozen=True)
class MoonSettings(SampleWeights):
    what: ClassVar[str] = "moon"

    mu: float = setting(1.0, "[M] best of 0.1, 1, 5, 10 on two of its three tasks: 5, 1 and 1", low=0.0)
    temperature: float = setting(0.5, "[M]", low=1e-6)


class Moon(Method):
    """Li Q. et al., "Model-contrastive federated learning", CVPR 2021.

        site k:  min  BCE(w) + mu l,   l = -log [ e^{s(z, z_g)/tau} / (e^{s(z, z_g)/tau} + e^{s(z, z_p)/tau}) ]
        server:  as FedAvg

    s: cosine; z, z_g, z_p: features of an image in the model being trained, the received one and the site's own of the
    round before, the last two frozen. The paper adds a two-layer projection head; here the features are those before
    the classifier's last layer, so that the network is every other method's [R]. In round 0 both frozen models are the
    initial one and l has no gradient. The previous model stays at the site, in its resume state.
    Sent: as FedAvg, 42.7 MiB per round with ResNet18.

    Degenerates: with mu = 0 into FedAvg.
    """

    name = "moon"
    title = "MOON"
    status = "reconstruction"
    citation = "Li Q. et al., CVPR 2021, arXiv 2103.16257"
    leaves = ("W1: all tensors of the classifier (weights, BatchNorm statistics and counters)", *COMMON_LEAVES)
    Settings = MoonSettings
    settings: MoonSettings
    _received: nn.Module | None = None

    def network(self, weights: str) -> nn.Module:
        model = super().network(weights)
        model.previous = copy.deepcopy(model.net).requires_grad_(False)
        return model

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in model.state_dict() if not name.startswith("previous."))

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        self._received = copy.deepcopy(model.net).requires_grad_(False).eval()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if not self.settings.mu or self._received is None:
            return super().loss(model, batch)
        z = features(model.net, batch.images)
        with torch.no_grad():
            model.previous.eval()
            received, previous = features(self._received, batch.images), features(model.previous, batch.images)
        loss = bce(model.net.fc(z).squeeze(1), batch.labels)
        return loss + self.settings.mu * contrast(z, received, previous, self.settings.temperature)

    def round_end(self, model: nn.Module, examples: Examples) -> None:
        model.previous.load_state_dict(model.net.state_dict())


def contrast(z: Tensor, received: Tensor, previous: Tensor, temperature: float) -> Tensor:
    """The mean of l over features (b, d), in float32; log 2 where received and previous features are the same."""
    z, received, previous = z.float(), received.float(), previous.float()
    near, far = cosine_similarity(z, received), cosine_similarity(z, previous)
    return softplus((far - near) / temperature).mean()
