"""FedBN: every site keeps its BatchNorm layers, all else is averaged (Li X. et al. 2021, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from heterosync.methods.base import COMMON_LEAVES, EqualWeights, Method


@dataclass(frozen=True)
class FedBNSettings(EqualWeights):
    what: ClassVar[str] = "fedbn"


def batchnorm_names(model: nn.Module) -> set[str]:
    """State tensors of all BatchNorm layers, by the layer's type: of ResNet18's 100, 15 have no "bn" in their name."""
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, _BatchNorm)]
    return {f"{path}.{name}" for path, layer in layers for name in layer.state_dict()}


class FedBN(Method):
    """Li X. et al., "FedBN: federated learning on non-IID features via local batch normalization", ICLR 2021.

        site k:  w_k = (theta_k, b_k) <- local epochs of BCE from (theta, b_k)      server:  theta <- (1/K) sum theta_k

    b: of each BatchNorm layer weight, bias, running mean, running variance and counter; never sent, equal at the start.
    Sent: theta, 22 of ResNet18's 122 tensors, 42.6 MiB per round. The official code weighs all sites alike, selects
    layers by name (and so averages the three of the shortcuts) and uses SGD 0.01; the recipe of all methods is used
    here. Each site is tested with its own model; there is no model for unseen sites.

    Degenerates: for a network without BatchNorm into FedAvg with equal weights.
    """

    name = "fedbn"
    title = "FedBN"
    status = "exact"
    citation = "Li X. et al., ICLR 2021, arXiv 2102.07623"
    leaves = ("W1: the classifier's tensors without those of its BatchNorm layers", *COMMON_LEAVES)
    personal = True
    Settings = FedBNSettings

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        kept = batchnorm_names(model)
        return tuple(name for name in model.state_dict() if name not in kept)
