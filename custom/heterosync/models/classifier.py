"""The single-task network: one ResNet with one logit (paper, Model development; 11,177,025 parameters at defaults)."""

from __future__ import annotations

from torch import Tensor, nn

from heterosync.models.encoder import build_encoder


class Classifier(nn.Module):
    """Images (b, c, h, w) -> logits (b,) of the positive class; the last layer stays in float32 under autocast."""

    def __init__(self, backbone: str = "resnet18", channels: int = 3, weights: str = "none") -> None:
        super().__init__()
        self.net = build_encoder(backbone, channels, weights, outputs=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).squeeze(1)
