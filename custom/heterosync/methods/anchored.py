"""What the variants of HSL share: the weight of the anchor task over the rounds, the network with one encoder."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from heterosync.methods.base import COMMON_LEAVES, Method, Partner
from heterosync.methods.paired import ExpertSettings
from heterosync.models.mechanism import coupling
from heterosync.models.shared import SharedEncoder, SharedLinear, SharedMMoE
from heterosync.training import Batch, Settings, setting
from heterosync.training.examples import Examples


@dataclass(frozen=True)
class AnchorSettings(Settings):
    """How much the anchor task counts beside the primary one, whose weight is 1."""

    what: ClassVar[str] = "method"

    anchor_weight: float = setting(1.0, "[own] as much as the primary task, as in HSL", low=0.0)
    anchor_schedule: str = setting("constant", "[own]", choices=("constant", "rising", "falling"))
    anchor_rounds: int = setting(10, "[own] rounds in which the weight rises from 0 or falls to 0", low=1)

    def idle(self) -> dict[str, str]:
        if not self.anchor_weight:
            return {**super().idle(), **dict.fromkeys(("anchor_schedule", "anchor_rounds"), "anchor_weight above 0")}
        if self.anchor_schedule != "constant":
            return super().idle()
        return {**super().idle(), "anchor_rounds": "anchor_schedule=rising or falling"}


@dataclass(frozen=True)
class SharedSettings(AnchorSettings, ExpertSettings):
    """The network with one encoder and the weight of its anchor task."""

    heads: str = setting("mmoe", "[own] HSL's mixture, or a layer for each task", choices=("mmoe", "linear"))
    statistics: str = setting(
        "task", "[own] BatchNorm's: of each task, or of both together", choices=("task", "shared")
    )

    def idle(self) -> dict[str, str]:  # never `statistics`: each choice has tensors of its own, at any anchor weight
        if self.heads == "mmoe":
            return super().idle()
        return {**super().idle(), **dict.fromkeys(self.mixture(), "heads=mmoe")}


def anchor_weight(settings: AnchorSettings, round_: int) -> float:
    """The weight of the anchor task in a round, counted from 0.

    constant a; rising a min(1, (r + 1) / R); falling a max(0, 1 - r / R), R = `anchor_rounds`.
    """
    share = {
        "constant": 1.0,
        "rising": min(1.0, (round_ + 1) / settings.anchor_rounds),
        "falling": max(0.0, 1 - round_ / settings.anchor_rounds),
    }
    return settings.anchor_weight * share[settings.anchor_schedule]


def anchored_terms(logits: Sequence[Tensor], batch: Batch, weight: float) -> dict[str, Tensor]:
    """BCE of the primary task and `weight` times that of the anchor task (left out where it is 0), to be added up."""
    terms = {"primary": bce(logits[0], batch.labels)}
    if weight:
        assert batch.anchor_labels is not None
        terms["anchor"] = weight * bce(logits[1], batch.anchor_labels)
    return terms


class Anchored(Method):
    """A method whose loss is the sum of named terms, and whose anchor task has a weight in every round."""

    uses_anchor = couples = True
    status = "variant"
    _round = 0

    def batches(self, model: nn.Module, examples: Examples, round_: int, epoch: int) -> Iterator[Batch]:
        self._round = round_
        return examples.batches(round_, epoch)

    @abstractmethod
    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss by what they come from."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return torch.stack(list(self.terms(model, batch).values())).sum()


class OneEncoder(Anchored):
    """Anchored methods with one encoder for both tasks."""

    leaves = ("W1: all tensors of the network (weights, BatchNorm statistics and counters)", *COMMON_LEAVES)
    settings: SharedSettings

    def network(self, weights: str) -> nn.Module:
        settings = self.settings
        common = (self.training.backbone, self.training.channels, weights, settings.statistics)
        return SharedLinear(*common) if settings.heads == "linear" else SharedMMoE(*common, **settings.mixture())

    def predict(self, model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
        return torch.sigmoid(model(images))

    def diagnostics(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        """The gradients of both tasks on the encoder, and the mixture's share of tower 1's input where there is one."""
        batch = examples.sample()
        if not isinstance(model, SharedEncoder) or batch.anchor_images is None or batch.anchor_labels is None:
            return {}
        return coupling(model, batch.images, batch.labels, batch.anchor_images, batch.anchor_labels)
