"""How strongly the anchor task reaches the primary task inside an MMoE, in numbers per round."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from heterosync.models.mmoe import MMoE
from heterosync.models.shared import SharedEncoder, SharedMMoE


def mechanism(model: MMoE, primary: Tensor, labels: Tensor, anchor: Tensor, anchor_labels: Tensor) -> dict[str, float]:
    """Measure on two small batches (b, c, h, w) with labels (b,); model, gradients and mode stay as they were.

    primary_gradient        |dL_primary/d encoder 1|, the L2 norm over all its weights
    anchor_gradient         |dL_anchor/d encoder 1|
    anchor_gradient_ratio   the second over the first; both losses count 1, whatever weights the method gives them
    partner_effect          mean |change of the primary probability| when the partner image is replaced by the next one
    mixture_share           |m_1| / (|m_1| + |s_1|): part of tower 1's input that comes from the mixture, not the skip
    """
    with _evaluating(model):
        with torch.enable_grad():
            f1 = model.encode(0, primary)
            f2 = model.encode(1, anchor).detach()
            paired = torch.arange(len(f1), device=f1.device) % len(f2)  # the two batches may differ in size
            logit1, logit2 = model.decide(f1, f2[paired])
            losses = bce(logit1, labels), bce(logit2, anchor_labels[paired])
            found = _gradients(*losses, list(model.encoders[0].parameters()))
        with torch.no_grad():
            head = _head_copy(model)
            f1, f2, paired = f1.cpu().double(), f2.cpu().double(), paired.cpu()
            effect = torch.stack([_partner_step(head, f1, f2, shift) for shift in range(len(f2))]).mean()
            mixtures, skips = head.mix(f1, f2[paired])
    return found | {"partner_effect": float(effect), "mixture_share": _share(mixtures[0], skips[0])}


def coupling(
    model: SharedEncoder, primary: Tensor, labels: Tensor, anchor: Tensor, anchor_labels: Tensor
) -> dict[str, float]:
    """The same for the network with one encoder, where no image has a partner: all but partner_effect, and
    mixture_share where there is a mixture."""
    with _evaluating(model):
        with torch.enable_grad():
            f1, f2 = model.encode(0, primary), model.encode(1, anchor)
            losses = bce(model.decide(0, f1), labels), bce(model.decide(1, f2), anchor_labels)
            found = _gradients(*losses, list(model.encoder.parameters()))
        if isinstance(model, SharedMMoE):
            with torch.no_grad():
                found["mixture_share"] = _share(*model.mix(0, f1.to(model.skips[0].weight.dtype)))
    return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, and with the BatchNorm statistics as they are."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _gradients(primary: Tensor, anchor: Tensor, weights: list[nn.Parameter]) -> dict[str, float]:
    main, side = (_norm(torch.autograd.grad(loss, weights, retain_graph=True)) for loss in (primary, anchor))
    return {
        "primary_gradient": float(main),
        "anchor_gradient": float(side),
        "anchor_gradient_ratio": float(side / main.clamp_min(1e-30)),
    }


def _share(mixture: Tensor, skip: Tensor) -> float:
    return float(mixture.norm() / (mixture.norm() + skip.norm()).clamp_min(1e-30))


def _head_copy(model: MMoE) -> MMoE:
    """The part behind the encoders in float64 on the CPU (not every device has float64): at the start a partner moves
    p by less than float32 shows."""
    encoders, model.encoders = model.encoders, nn.ModuleList()
    try:
        head = copy.deepcopy(model).cpu().double()
    finally:
        model.encoders = encoders
    return head


def _partner_step(head: MMoE, f1: Tensor, f2: Tensor, shift: int) -> Tensor:
    """Mean |p(image i, partner i + shift) - p(image i, partner i + shift + 1)|."""
    rows = torch.arange(len(f1), device=f2.device)
    partners = [f2[(rows + step) % len(f2)] for step in (shift, shift + 1)]
    p, q = (torch.sigmoid(head.decide(f1, partner)[0]) for partner in partners)
    return (p - q).abs().mean()


def _norm(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([gradient.cpu().double().norm() for gradient in gradients]).norm()
