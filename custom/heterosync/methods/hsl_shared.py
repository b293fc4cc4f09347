"""HSL with one encoder: the anchor task trains the very features that the primary task uses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from heterosync.methods.anchored import (
    SharedSettings,
    anchor_weight,
    anchored_terms,
    shared_diagnostics,
    shared_network,
    total,
)
from heterosync.methods.base import COMMON_LEAVES, Method, Partner
from heterosync.training import Batch
from heterosync.training.examples import Examples


@dataclass(frozen=True)
class HSLSharedSettings(SharedSettings):
    what: ClassVar[str] = "hsl_shared"


class HSLShared(Method):
    """A variant of Hu et al. 2025 (docs/anchor.md), with the mixture of experts of Ma et al., KDD 2018.

        site k:  w_k <- local epochs of BCE(p_1, y) + a(r) BCE(p_2, y_anchor) from w      server:  w <- (1/K) sum w_k

    p_1, p_2: answers of two towers above one encoder and common experts, each to its own image; no image has a partner.
    a(r): `anchor_weight` with its schedule over the rounds. `statistics`: BatchNorm's are kept for each task (so that
    those of the primary task stay what they would be without anchor images), or are those of a batch of both.
    Sent: every tensor, 45.4 MiB per round with ResNet18, in each direction.

    Degenerates: with `anchor_weight` 0, where anchor images are not looked at, into `fedavg` with `weighting` equal and
    this network in place of the plain one.
    """

    name = "hsl_shared"
    title = "HSL, one encoder"
    status = "variant"
    citation = "this project, after Hu et al., Nat. Commun. 16, 9416 (2025) and Ma et al., KDD 2018"
    leaves = ("W1: all tensors of the network (weights, BatchNorm statistics and counters)", *COMMON_LEAVES)
    uses_anchor = True
    Settings = HSLSharedSettings
    settings: HSLSharedSettings
    _round = 0

    def network(self, weights: str) -> nn.Module:
        return shared_network(self.settings, self.training, weights)

    def batches(self, model: nn.Module, examples: Examples, round_: int, epoch: int) -> Iterator[Batch]:
        self._round = round_
        return examples.batches(round_, epoch)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss by the task that they come from."""
        weight = anchor_weight(self.settings, self._round)
        if not weight:
            return {"primary": bce(model(batch.images), batch.labels)}
        return anchored_terms(model(batch.images, batch.anchor_images), batch, weight)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return total(self.terms(model, batch))

    def predict(self, model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
        return torch.sigmoid(model(images))

    def diagnostics(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        return shared_diagnostics(model, examples.sample())
