"""Networks: the single-task ResNet and the two-task MMoE of HSL."""

from heterosync.models.classifier import Classifier
from heterosync.models.encoder import BACKBONES, build_encoder, resolved_weights
from heterosync.models.mmoe import MMoE

__all__ = ["BACKBONES", "Classifier", "MMoE", "build_encoder", "resolved_weights"]
