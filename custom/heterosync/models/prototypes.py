"""FedKTL's parts: a fixed classifier on a simplex, a loss with an angular margin, and the server's feature transformer.

Zhang J. et al., CVPR 2024, arXiv 2403.15760; the margin is ArcFace's (Deng et al., CVPR 2019, arXiv 1801.07698).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize

from heterosync import pulse
from heterosync.models.encoder import FullLinear, build_encoder, features

CLASSES = 2
#: Of the kernels that compare the transformed prototypes with the generator's vectors (official code).
BANDWIDTHS = (10.0, 15.0, 20.0, 50.0)


def simplex_etf(classes: int) -> Tensor:
    """An equiangular tight frame: `classes` unit rows of as many entries, each two with cosine -1 / (classes - 1).

    It is turned by a random rotation from the global generator.
    """
    rotation = torch.linalg.qr(torch.randn(classes, classes)).Q
    centred = torch.eye(classes) - 1 / classes
    return math.sqrt(classes / (classes - 1)) * centred @ rotation.T


class PrototypeNet(nn.Module):
    """A ResNet with a head of `CLASSES` values, and what FedKTL sends beside it.

    etf (C, C): the frame, a row per class. proj: features -> vectors of the generator. lat (C, latent) and img
    (C, c, side, side): a vector and its image per class, of the classes marked in img_class (C,). proto (C, C): the
    site's prototypes, of the classes marked in proto_class (C,).
    """

    def __init__(self, backbone: str, channels: int, side: int, latent: int, weights: str) -> None:
        super().__init__()
        self.net = build_encoder(backbone, channels, weights, outputs=CLASSES)
        self.proj = FullLinear(self.net.fc.in_features, latent)
        self.register_buffer("etf", simplex_etf(CLASSES))
        self.register_buffer("lat", torch.zeros(CLASSES, latent))
        self.register_buffer("img", torch.zeros(CLASSES, channels, side, side))
        self.register_buffer("img_class", torch.zeros(CLASSES, dtype=torch.int64))
        self.register_buffer("proto", torch.zeros(CLASSES, CLASSES))
        self.register_buffer("proto_class", torch.zeros(CLASSES, dtype=torch.int64))

    def body(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> features (b, d)."""
        return features(self.net, images)

    def direction(self, found: Tensor) -> Tensor:
        """Features (b, d) -> the head's answer, unit vectors (b, C), in float64: near 1 cosines lie close together."""
        return normalize(self.net.fc(found).double())

    def cosines(self, found: Tensor) -> Tensor:
        """Features (b, d) -> cosines (b, C) with the frame, in float64."""
        return self.direction(found) @ normalize(self.etf.double()).T

    def forward(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) -> (1 + (cos_1 - cos_0) / 2) / 2 in [0, 1], (b,), in float64."""
        cosines = self.cosines(self.body(images))
        return ((1 + (cosines[:, 1] - cosines[:, 0]) / 2) / 2).clamp(0, 1)


def margin_logits(cosines: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """scale x cosines (b, C), with cos(angle + margin) for the class of each label (b,), int64.

    Where angle + margin would pass pi, cos - margin sin(margin) takes its place, so that it keeps falling (ArcFace).
    """
    true = cosines.gather(1, labels[:, None])
    sine = (1 - true.square()).clamp_min(1e-12).sqrt()
    turned = true * math.cos(margin) - sine * math.sin(margin)
    turned = torch.where(true > math.cos(math.pi - margin), turned, true - margin * math.sin(margin))
    return scale * cosines.scatter(1, labels[:, None], turned)


def margin_loss(cosines: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Cross-entropy over `margin_logits`, the mean over the batch."""
    return cross_entropy(margin_logits(cosines, labels, scale, margin), labels)


def feature_transformer(classes: int, latent: int) -> nn.Sequential:
    """The server's map of prototypes (n, classes) to vectors of the generator (n, latent)."""
    return nn.Sequential(nn.Linear(classes, classes), nn.BatchNorm1d(classes), nn.ReLU(), nn.Linear(classes, latent))


def discrepancy(one: Tensor, other: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of samples (n, d), (m, d): kernels exp(-|x - y|^2 / (2 b)), summed over b."""

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        distances = (x[:, None] - y[None]).square().sum(2)
        return torch.stack([torch.exp(-distances / (2 * b)) for b in BANDWIDTHS]).sum(0).mean()

    return kernel(one, one) + kernel(other, other) - 2 * kernel(one, other)


def class_means(values: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Means (classes, d) of the rows of each class; zeros for a class without rows."""
    member = nn.functional.one_hot(labels, classes).to(values.dtype)
    return member.T @ values / member.sum(0).clamp_min(1)[:, None]


def align(
    transformer: nn.Module,
    prototypes: Tensor,
    labels: Tensor,
    home: Callable[[int], Tensor],
    pull: float,
    epochs: int,
    lr: float,
    batch: int,
    generator: torch.Generator,
) -> tuple[Tensor, list[float]]:
    """Train the transformer F until prototypes (n, C) of each class meet where the generator is at home.

        q_c <- mean of F(p) over class c      min  MMD^2(F(p), home) + pull MSE(F(p), q_y)      q_c <- the mean again

    by Adam, in `epochs` passes over batches of at most `batch` prototypes and as many of the generator's own vectors
    from `home`. n is at least 2, since F has a BatchNorm, which sees batch statistics throughout.

    Returns q (C, d), zeros for absent classes, and the MMD^2 of each epoch.
    """
    transformer.train()
    optimizer = torch.optim.Adam(transformer.parameters(), lr)
    # No part of one prototype alone: batch statistics need two.
    classes, parts = prototypes.shape[1], max(1, min(math.ceil(len(prototypes) / batch), len(prototypes) // 2))
    with torch.no_grad():
        centres = class_means(transformer(prototypes), labels, classes)
    trace = []
    for _ in range(epochs):
        pulse.beat()
        total = 0.0
        for rows in torch.randperm(len(prototypes), generator=generator).tensor_split(parts):
            mapped = transformer(prototypes[rows])
            apart = discrepancy(mapped, home(batch))
            optimizer.zero_grad(set_to_none=True)
            (apart + pull * mse_loss(mapped, centres[labels[rows]])).backward()
            optimizer.step()
            total += float(apart.detach()) * len(rows) / len(prototypes)
        trace.append(total)
    with torch.no_grad():
        return class_means(transformer(prototypes), labels, classes), trace
