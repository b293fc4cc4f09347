"""FedRCL: supervised contrast at several depths, with a penalty on classes that collapse (Seo et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus
from torchvision.models.resnet import ResNet

from heterosync.methods.base import COMMON_LEAVES, EqualWeights, Method
from heterosync.training import Batch, setting

#: The stem and the four stages of a ResNet.
LEVELS = 5


@dataclass(frozen=True)
class FedRCLSettings(EqualWeights):
    what: ClassVar[str] = "fedrcl"

    contrast: float = setting(1.0, "[C] weight of S", low=0.0)
    beta: float = setting(1.0, "[M] weight of the penalty P", low=0.0)
    tau: float = setting(0.05, "[M]", low=1e-3)
    lambda_: float = setting(0.7, "[M] cosine from which a pair counts as collapsed", low=-1.0, high=1.0)
    topk_neg: int = setting(2, "[C] only the most similar images of the other class count", low=1)
    penalty: str = setting(
        "hardest",
        "[C] the least similar pair of each image; all_pairs: [M] each above lambda_",
        choices=("hardest", "all_pairs"),
    )
    levels: int = setting(LEVELS, "[M] stem and four stages; fewer: the deepest ones", low=1, high=LEVELS)
    norm: str = setting("bn", "[R] as all methods here; gn: GroupNorm of 2 groups [C]", choices=("bn", "gn"))
    max_norm: float = setting(0.0, "[R] off; the native recipe clips the gradient's norm at 10 [C]", low=0.0)

    def idle(self) -> dict[str, str]:
        idle = {} if self.contrast else {"topk_neg": "contrast above 0"}
        if not self.beta:
            idle |= dict.fromkeys(("lambda_", "penalty"), "beta above 0")
        if not self.contrast and not self.beta:
            idle |= dict.fromkeys(("tau", "levels"), "contrast or beta above 0")
        return idle


class FedRCL(Method):
    """Seo et al., "Relaxed contrastive learning for federated learning", CVPR 2024.

        site k:  min  BCE(w) + mean over levels of [ S + beta P ]
                 S_i = -log [ e^{c_ip/tau} / (e^{c_ip/tau} + sum_{n in N_i} e^{c_in/tau}) ]
                 P_i = log(1 + e^{(u_i - 1)/tau}),   u_i = c_iq if that is at least lambda, else -1
        server:  w <- (1/K) sum_k w_k

    c: cosine of the features of two images of a batch, globally pooled before the last ReLU of the level. p: the least
    similar image of the same class (i itself where it is alone), q: the same among the others, N_i: the two most
    similar images of the other class. With `penalty` all_pairs P_i = log(1 + sum_q e^{(c_iq - 1)/tau}) over all q above
    lambda. The classifier keeps its one logit and BCE for the paper's softmax. In a batch of one class S is 0.
    Sent: as FedAvg, 42.7 MiB per round with ResNet18; no feature leaves a site.

    The native recipe [C]: norm=gn, max_norm=10 and, of training, SGD at 0.1 with weight decay 1e-3, batches of 50.

    Degenerates: with contrast = 0 and beta = 0 into FedAvg with `weighting` equal (the terms are left out).
    """

    name = "fedrcl"
    title = "FedRCL"
    status = "exact"
    citation = "Seo et al., CVPR 2024, arXiv 2401.04928"
    leaves = ("W1: all tensors of the classifier (weights, BatchNorm statistics and counters)", *COMMON_LEAVES)
    Settings = FedRCLSettings
    settings: FedRCLSettings

    def network(self, weights: str) -> nn.Module:
        model = super().network(weights)
        if self.settings.norm == "gn":
            for path, layer in list(model.named_modules()):
                if isinstance(layer, nn.BatchNorm2d):
                    model.set_submodule(path, nn.GroupNorm(2, layer.num_features))
        return model

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        chosen = self.settings
        if not chosen.contrast and not chosen.beta:
            return super().loss(model, batch)
        with pooled_features(model.net, chosen.levels) as found:
            loss = super().loss(model, batch)
        extra = []
        for features in found.values():
            s, p = contrast_terms(
                features, batch.labels, chosen.tau, chosen.topk_neg, chosen.lambda_, chosen.penalty == "all_pairs"
            )
            extra.append(chosen.contrast * s.mean() + chosen.beta * p.mean())
        return loss + torch.stack(extra).mean()

    def correct_gradients(self, model: nn.Module) -> None:
        if self.settings.max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), self.settings.max_norm)


@contextmanager
def pooled_features(net: ResNet, levels: int = LEVELS) -> Iterator[dict[int, Tensor]]:
    """While it is open, every forward pass of `net` leaves here the features (b, d) of its `levels` deepest levels."""
    stages = (net.layer1, net.layer2, net.layer3, net.layer4)
    last_relu = [net.relu, *(stage[-1].relu for stage in stages)]
    found: dict[int, Tensor] = {}

    def keep(level: int):
        def hook(_: nn.Module, inputs: tuple[Tensor]) -> None:
            # A block calls its ReLU twice and the last call counts. Pooled at once: the ReLU works in place.
            found[level] = inputs[0].float().mean((2, 3))

        return hook

    handles = [last_relu[i].register_forward_pre_hook(keep(i)) for i in range(LEVELS - levels, LEVELS)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def contrast_terms(
    features: Tensor, labels: Tensor, tau: float, topk: int, threshold: float, all_pairs: bool = False
) -> tuple[Tensor, Tensor]:
    """S (b,) and P (b,) of each image, from features (b, d) of one level and labels (b,)."""
    unit = normalize(features)
    with torch.autocast(features.device.type, enabled=False):  # a bfloat16's rounding would be a tenth of tau
        cosine = unit @ unit.T
    alike = labels[:, None] == labels[None, :]
    least = cosine.masked_fill(~alike, torch.inf).amin(1)
    other = cosine.masked_fill(alike, -torch.inf).topk(min(topk, len(labels)), dim=1).values
    s = torch.logsumexp(torch.cat([least[:, None], other], 1) / tau, 1) - least / tau

    pairs = alike & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    if all_pairs:
        close = ((cosine - 1) / tau).masked_fill(~(pairs & (cosine >= threshold)), -torch.inf)
        return s, torch.logsumexp(torch.cat([torch.zeros_like(close[:, :1]), close], 1), 1)
    partner = cosine.masked_fill(~pairs, torch.inf).amin(1)
    collapsed = pairs.any(1) & (partner >= threshold)
    return s, softplus((torch.where(collapsed, partner, -1.0) - 1) / tau)
