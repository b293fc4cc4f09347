"""Ditto: every site trains a model of its own beside the global one, held near to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from heterosync.methods.base import COMMON_LEAVES, Method, Partner, SampleWeights
from heterosync.methods.proximal import proximal_term
from heterosync.training import Batch, Examples, setting


@dataclass(frozen=True)
class DittoSettings(SampleWeights):
    what: ClassVar[str] = "ditto"

    lambda_: float = setting(0.1, "[R] the paper tunes it over 0.05 to 2, at each site", low=0.0)


class Ditto(Method):
    """Li T. et al., "Ditto: fair and robust federated learning through personalization", ICML 2021.

        site k, global model:  w_k <- local epochs of BCE(w) from w                    server:  as FedAvg
        site k, own model:     min over v_k of  BCE(v_k) + (lambda / 2) ||v_k - w||^2,  w as received

    Both train on the same batches; they share no parameter, so one optimiser of the summed loss is one for each. The
    site is tested with v_k, whose validation AUC also chooses the round's snapshot of both [R]. v_k stays at the site,
    in its resume state. Sent: the global model's tensors, as FedAvg, 42.7 MiB per round with ResNet18.

    Degenerates: with lambda = 0 the own models are local learning; with one epoch per round the global model is
    FedAvg's.
    """

    name = "ditto"
    title = "Ditto"
    status = "exact"
    citation = "Li T. et al., ICML 2021, arXiv 2012.04221"
    leaves = ("W1: all tensors of the global classifier, never of the site's own", *COMMON_LEAVES)
    personal = True
    Settings = DittoSettings
    settings: DittoSettings
    _received: list[Tensor] | None = None

    def network(self, weights: str) -> nn.Module:
        model = super().network(weights)
        model.own = copy.deepcopy(model.net)
        return model

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in model.state_dict() if not name.startswith("own."))

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        self._received = [parameter.detach().clone() for parameter in model.net.parameters()]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss = super().loss(model, batch) + bce(model.own(batch.images).squeeze(1), batch.labels)
        if not self.settings.lambda_ or self._received is None:
            return loss
        return loss + proximal_term(list(model.own.parameters()), self._received, self.settings.lambda_)

    def predict(self, model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
        return torch.sigmoid(model.own(images).squeeze(1))
