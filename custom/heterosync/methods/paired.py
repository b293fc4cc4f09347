"""What methods with the two-task network share: its settings, the joint loss, scoring with a partner image."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from heterosync.errors import UserError
from heterosync.methods.base import COMMON_LEAVES, Method, Partner
from heterosync.models import MMoE
from heterosync.models.mechanism import mechanism
from heterosync.training import Batch, Examples, Settings, TrainingSettings, setting
from heterosync.training.seeds import stream


@dataclass(frozen=True)
class ExpertSettings(Settings):
    """The part behind the encoders (paper, Model development; details from the official code)."""

    what: ClassVar[str] = "method"

    n_experts: int = setting(12, "[C]", low=1)
    expert_hidden: int = setting(62, "[C] as published, not 64", low=1)
    expert_out: int = setting(32, "[C]", low=1)
    tower_hidden: int = setting(16, "[C]", low=1)
    drop_expert: float = setting(0.3, "[C]", low=0.0, high=0.99)
    drop_tower: float = setting(0.4, "[C]", low=0.0, high=0.99)

    def mixture(self) -> dict[str, Any]:
        """These settings alone, by name: arguments of the networks."""
        return {item.name: getattr(self, item.name) for item in fields(ExpertSettings)}


@dataclass(frozen=True)
class MMoESettings(ExpertSettings):
    """The two-task network (paper, Model development; details from the official code)."""

    temperature: float = setting(3.0, "[C] T = 3: divides the joint features before their softmax", low=1e-6)


@dataclass(frozen=True)
class PartnerSettings(Settings):
    """The second image of a score."""

    what: ClassVar[str] = "method"

    test_partner: str = setting(
        "self", "[C] 2025 demo; sat_index: 2024 script; sat_mean [R]", choices=("self", "sat_index", "sat_mean")
    )
    n_partners: int = setting(16, "[R] partners of sat_mean", low=1)


@dataclass(frozen=True)
class PairedSettings(PartnerSettings, MMoESettings):
    """The MMoE, its joint loss and its partner image (paper, Model development; details from the official code)."""

    loss_weights: tuple[float, float] = setting((0.5, 0.5), "[C] primary, anchor", low=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not any(self.loss_weights):
            raise UserError("method setting 'loss_weights' is all zero: give at least one task a weight above 0")


def paired_network(settings: MMoESettings, training: TrainingSettings, weights: str) -> MMoE:
    return MMoE(
        training.backbone,
        training.channels,
        weights,
        settings.temperature,
        **settings.mixture(),
    )


def paired_terms(settings: PairedSettings, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """w_1 BCE(primary) and w_2 BCE(anchor) (official code); a task of weight 0 is left out, not multiplied by 0."""
    logits = model(batch.images, batch.anchor_images)
    labels = (batch.labels, batch.anchor_labels)
    tasks = zip(("primary", "anchor"), settings.loss_weights, logits, labels, strict=True)
    return {name: weight * bce(logit, label) for name, weight, logit, label in tasks if weight}


def paired_loss(settings: PairedSettings, model: nn.Module, batch: Batch) -> Tensor:
    """The sum of `paired_terms`."""
    return torch.stack(list(paired_terms(settings, model, batch).values())).sum()


def unpaired_loss(model: nn.Module, batch: Batch) -> Tensor:
    """BCE of the primary task alone, every image its own partner: the MMoE without anchor task (paper, Ablation)."""
    return bce(model(batch.images, batch.images)[0], batch.labels)


def paired_predict(model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
    """Probability (b,) of the primary task; `partner` "self" shows the image to both encoders."""
    return torch.sigmoid(model(images, images if isinstance(partner, str) else partner)[0])


class Paired(Method):
    """A method with the two-task network: every image is scored beside its partner."""

    couples = True
    leaves = (
        "W1: all tensors of the two-task network (weights, BatchNorm statistics and counters)",
        *COMMON_LEAVES,
    )
    settings: PartnerSettings

    def predict(self, model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
        return paired_predict(model, images, partner)

    def partner_rows(self, n_images: int, n_anchor: int) -> np.ndarray | None:
        """Anchor rows of the setting `test_partner`, fixed by the seed and equal at every site (docs/hsl.md, The
        partner image).

        sat_index   (1, n): image i of a split with the i-th image of a shuffled anchor list, random ones beyond its
                    length. Reconstruction: the published script pairs by position with a separate anchor test set,
                    which is not available (nor is its size given); the partners here come from the anchor pack itself,
                    which the network has trained on. `heterosync predict` (study/predict.py) has no split whose order
                    could count, and picks an image's partner by a hash of the image's content.
        sat_mean    (n_partners, n): the same partners for every image, from the anchor pack too
        """
        kind = self.settings.test_partner
        if kind == "self":
            return None
        if not n_anchor:
            raise UserError(f"method setting 'test_partner' is '{kind}', but there is no anchor pack: use 'self'")
        rng = stream(self.training.seed, "test partner")
        listed = rng.permutation(n_anchor)
        if kind == "sat_index":
            beyond = rng.integers(0, n_anchor, max(0, n_images - n_anchor))
            return np.concatenate([listed[:n_images], beyond])[None]
        chosen = listed[: self.settings.n_partners]
        return np.repeat(chosen[:, None], n_images, 1)

    def diagnostics(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        """The coupling of the tasks (models/mechanism.py), where there are two."""
        batch = examples.sample()
        if not isinstance(model, MMoE) or batch.anchor_images is None or batch.anchor_labels is None:
            return {}
        return mechanism(model, batch.images, batch.labels, batch.anchor_images, batch.anchor_labels)
