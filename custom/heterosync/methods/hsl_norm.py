"""HSL's network with a joint embedding of unit scale, through which gradients of the anchor task pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from heterosync.methods.anchored import Anchored, AnchorSettings, anchor_weight, anchored_terms
from heterosync.methods.paired import ExpertSettings, Paired, PartnerSettings
from heterosync.models.shared import NormedMMoE
from heterosync.training import Batch, setting


@dataclass(frozen=True)
class HSLNormSettings(PartnerSettings, AnchorSettings, ExpertSettings):
    what: ClassVar[str] = "hsl_norm"

    embedding: str = setting("layernorm", "[own]", choices=("layernorm", "scaled"))
    gate_temperature: float = setting(3.0, "[own] HSL's T, on the gates' logits", low=1e-6)
    test_partner: str = setting(
        "sat_mean", "[own] the partners of training; self is another", choices=("self", "sat_index", "sat_mean")
    )
    n_partners: int = setting(4, "[own] partners of sat_mean", low=1)


class HSLNorm(Paired, Anchored):
    """A variant of Hu et al. 2025 (docs/anchor.md).

        site k:  w_k <- local epochs of BCE(p_1, y) + a(r) BCE(p_2, y_anchor) from w      server:  w <- (1/K) sum w_k

    HSL's network with the same tensors; only the joint embedding differs (models/shared.py): `layernorm`, or the
    published softmax times its length, in place of entries near 1/1024; the temperature divides the gates' logits. The
    partner image counts here, so that scores are taken with anchor images as partners, as in training.
    a(r): `anchor_weight` with its schedule over the rounds. Sent: every tensor, 90.6 MiB per round with ResNet18.

    Degenerates: with `embedding` scaled and `gate_temperature` 1 into HSL of temperature 1 whose embedding is
    multiplied by its length; with `anchor_weight` 0 the second branch gets its gradients from the primary task alone.
    """

    name = "hsl_norm"
    title = "HSL, normed embedding"
    citation = "this project, after Hu et al., Nat. Commun. 16, 9416 (2025)"
    Settings = HSLNormSettings
    settings: HSLNormSettings

    def network(self, weights: str) -> nn.Module:
        s = self.settings
        return NormedMMoE(
            self.training.backbone,
            self.training.channels,
            weights,
            s.gate_temperature,
            **s.mixture(),
            embedding=s.embedding,
        )

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss by the task that they come from."""
        weight = anchor_weight(self.settings, self._round)
        return anchored_terms(model(batch.images, batch.anchor_images), batch, weight)
