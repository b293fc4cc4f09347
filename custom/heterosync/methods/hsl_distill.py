"""HSL with one encoder whose answers to the anchor images are held near those of the received global model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cosine_similarity

from heterosync.methods.anchored import OneEncoder, SharedSettings, anchor_weight, anchored_terms
from heterosync.models.shared import SharedEncoder
from heterosync.training import Batch, setting
from heterosync.training.examples import Examples


@dataclass(frozen=True)
class HSLDistillSettings(SharedSettings):
    what: ClassVar[str] = "hsl_distill"

    distill_weight: float = setting(1.0, "[own]", low=0.0)
    distill_on: str = setting("features", "[own]", choices=("features", "logits"))
    distill_temperature: float = setting(2.0, "[own] of the logits, as in Hinton et al. 2015", low=1e-6)

    def idle(self) -> dict[str, str]:
        if not self.distill_weight:
            return {**super().idle(), **dict.fromkeys(("distill_on", "distill_temperature"), "distill_weight above 0")}
        if self.distill_on == "logits":
            return super().idle()
        return {**super().idle(), "distill_temperature": "distill_on=logits"}


class HSLDistill(OneEncoder):
    """A variant of Hu et al. 2025 (docs/anchor.md), with knowledge distillation on public images (Hinton et al. 2015).

        site k:  w_k <- local epochs of BCE(p_1, y) + a(r) BCE(p_2, y_anchor) + b D from w
        server:  w <- (1/K) sum w_k
        features:  D = 1 - cos(f(x_anchor), f_g(x_anchor))
        logits:    D = tau^2 KL(p_g || p), the mean over both towers' answers at temperature tau to the anchor image

    The network is that of `hsl_shared`; g is the received model, which sees the same batch in the same mode, without
    dropout in the heads, so that D is 0 where a round starts. With `anchor_weight` 0 no anchor label counts: any public
    images do. Sent: every tensor, 45.4 MiB per round with ResNet18; the received model stays in memory for the round.

    Degenerates: with `distill_weight` 0 into `hsl_shared`.
    """

    name = "hsl_distill"
    title = "HSL, anchor distillation"
    citation = "this project, after Hu et al., Nat. Commun. 16, 9416 (2025) and Hinton et al. 2015, arXiv 1503.02531"
    Settings = HSLDistillSettings
    settings: HSLDistillSettings
    _received: SharedEncoder | None = None

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        self._received = copy.deepcopy(model).requires_grad_(False).eval()  # type: ignore[assignment]
        self._received.encoder.train()

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss by what they come from."""
        assert isinstance(model, SharedEncoder) and batch.anchor_images is not None
        weight, received = anchor_weight(self.settings, self._round), self._received
        held = self.settings.distill_weight and received is not None
        if not weight and not held:
            return {"primary": bce(model(batch.images), batch.labels)}
        f1, f2 = model.encode_both(batch.images, batch.anchor_images)
        terms = anchored_terms((model.decide(0, f1), model.decide(1, f2)), batch, weight)
        if held:
            assert received is not None
            with torch.no_grad():
                g2 = received.encode_anchor(batch.images, batch.anchor_images)
            terms["distillation"] = self.settings.distill_weight * self._distance(model, f2, received, g2)
        return terms

    def _distance(self, model: SharedEncoder, f: Tensor, received: SharedEncoder, g: Tensor) -> Tensor:
        if self.settings.distill_on == "features":
            return (1 - cosine_similarity(f.float(), g.float())).mean()
        tau, heads = self.settings.distill_temperature, model.heads()
        modes = [head.training for head in heads]
        for head in heads:
            head.eval()
        parts = [divergence(model.decide(task, f), received.decide(task, g), tau) for task in (0, 1)]
        for head, mode in zip(heads, modes, strict=True):
            head.train(mode)
        return torch.stack(parts).mean()


def divergence(logits: Tensor, towards: Tensor, temperature: float) -> Tensor:
    """temperature^2 times the mean Kullback-Leibler divergence from sigmoid(towards / temperature) to
    sigmoid(logits / temperature), for logits (b,)."""
    z, t = logits.float() / temperature, towards.float() / temperature
    p = torch.sigmoid(t)
    return temperature**2 * (bce(z, p) - bce(t, p))
