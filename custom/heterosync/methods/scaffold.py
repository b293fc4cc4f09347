"""SCAFFOLD: control variates correct the drift of the sites' steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heterosync.methods.base import COMMON_LEAVES, EqualWeights, Method
from heterosync.training import Examples, setting


@dataclass(frozen=True)
class ScaffoldSettings(EqualWeights):
    what: ClassVar[str] = "scaffold"

    server_lr: float = setting(1.0, "[M] global step size eta_g", low=1e-12)


def _zeros_like_parameters(model: nn.Module) -> nn.ParameterDict:
    """One frozen zero tensor per parameter; a dot has no place in the name of a tensor of a module."""
    zeros = [(name, nn.Parameter(torch.zeros_like(p), requires_grad=False)) for name, p in model.named_parameters()]
    return nn.ParameterDict([(name.replace(".", "/"), value) for name, value in zeros])  # a list keeps its order


class Scaffold(Method):
    """Karimireddy et al., "SCAFFOLD: stochastic controlled averaging for federated learning", ICML 2020.

        site k:  each step takes g - c_k + c for the gradient g; after the round  c_k <- mean of g over its steps
        server:  w <- w + eta_g ((1/K) sum_k w_k - w)        c <- (1/K) sum_k c_k        c and c_k start at 0

    For SGD with a constant rate and no weight decay the mean of g is the paper's option II,
    c_k - c + (w - w_k) / (steps eta); it stays defined for Adam and a schedule, where the correction comes before the
    optimiser [R]. Where a site is absent, its old c_k does not count towards c (in the paper it does).

    Sent: the classifier's tensors, as FedAvg, and under `control.*` down c, up c_k: 85.3 MiB per round with ResNet18,
    twice FedAvg's. c_k is a mean gradient on private images: class W1, as weights. The site keeps its c_k on its disk.

    Degenerates: in round 0, and in every round of a single site, into FedAvg with `weighting` equal.
    """

    name = "scaffold"
    title = "SCAFFOLD"
    status = "reconstruction"
    citation = "Karimireddy et al., ICML 2020, arXiv 1910.06378"
    leaves = (
        "W1: all tensors of the classifier (weights, BatchNorm statistics and counters)",
        "W1: the site's control variate, `control.*`: the mean gradient of the round, one tensor per parameter",
        *COMMON_LEAVES,
    )
    only_updates = False
    Settings = ScaffoldSettings
    settings: ScaffoldSettings
    _shift: list[Tensor]  # c - c_k
    _sum: list[Tensor]  # of the gradients of this round
    _steps: int

    def network(self, weights: str) -> nn.Module:
        model = super().network(weights)
        model.control, model.own_control = _zeros_like_parameters(model), _zeros_like_parameters(model)
        return model

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in model.state_dict() if not name.startswith("own_control."))

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        common, own = _values(model.control), _values(model.own_control)
        self._shift = [there - here for there, here in zip(common, own, strict=True)]
        self._sum = [torch.zeros_like(value) for value in own]
        self._steps = 0

    def correct_gradients(self, model: nn.Module) -> None:
        gradients = [parameter.grad for parameter in model.net.parameters()]
        torch._foreach_add_(self._sum, gradients)
        torch._foreach_add_(gradients, self._shift)
        self._steps += 1

    def round_end(self, model: nn.Module, examples: Examples) -> None:
        for total, common, own in zip(self._sum, _values(model.control), _values(model.own_control), strict=True):
            own.copy_(total / self._steps)
            common.copy_(own)  # what leaves the site

    def combine(
        self, sent: Mapping[str, Tensor], fused: dict[str, Tensor], memory: dict[str, Tensor], sites: int
    ) -> dict[str, Tensor]:
        if self.settings.server_lr == 1.0:
            return fused
        state = dict(fused)
        for name in [name.removeprefix("control.").replace("/", ".") for name in fused if name.startswith("control.")]:
            step = fused[name].double() - sent[name].double()
            state[name] = (sent[name].double() + self.settings.server_lr * step).to(fused[name].dtype)
        return state


def _values(controls: nn.ParameterDict) -> list[Tensor]:
    return [value.data for value in controls.values()]
