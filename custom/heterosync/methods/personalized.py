"""Personalised learning: half of the own weights, half of the others' mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from heterosync.methods.base import COMMON_LEAVES
from heterosync.methods.paired import Paired, PairedSettings, paired_loss, paired_network, unpaired_loss
from heterosync.training import Batch, TrainingSettings, setting

#: The tensor with the number of sites; 0 before the first fusion.
SITES = "sites"


@dataclass(frozen=True)
class PersonalizedSettings(PairedSettings):
    what: ClassVar[str] = "personalized"

    use_sat: bool = setting(True, "[R] the notes speak of the fusion rule only; run also without")
    self_weight: float = setting(0.5, "[C] formula of the official notes", low=0.0, high=1.0)
    compat_double_own: bool = setting(False, "[C] the published snippet's defect: own weights divided by 0.5")

    def idle(self) -> dict[str, str]:
        return {} if self.use_sat else dict.fromkeys(("loss_weights", "test_partner", "n_partners"), "use_sat=true")


def personal_mix(own: Tensor, mean: Tensor, sites: int, own_weight: float, others_weight: float) -> Tensor:
    """own_weight w_i + others_weight (K m - w_i) / (K - 1), in float64; rounded for counters."""
    w, m = own.double(), mean.double()
    mixed = own_weight * w + others_weight * (sites * m - w) / (sites - 1)
    return (mixed if own.is_floating_point() else mixed.round()).to(own.dtype)


class Personalized(Paired):
    """Reference 21 of Hu et al. 2025, which could not be identified; rebuilt from the official notes of 2024.

        site i:  w_i <- 1/2 w_i + 1/2 (1/(K-1)) sum_{j != i} w_j,   from the server's mean m as (K m - w_i) / (K - 1)
                 then local epochs of HSL's loss        server:  m <- (1/K) sum_k w_k

    Network, loss and anchor task are HSL's. Sent: all tensors, 90.6 MiB per round with ResNet18, and one counter: K
    comes down in the tensor `sites`. All sites must contribute to every round, or K m - w_i is not the others' sum.
    The published snippet doubles the own weights instead (mass 2.5): `compat_double_own`. Tested with each site's own.

    Degenerates: with two sites into HSL; with `self_weight` 1 into local learning of the two-task network.
    """

    name = "personalized"
    title = "Personalised learning"
    status = "reconstruction"
    citation = "reference 21 of Hu et al., Nat. Commun. 16, 9416 (2025), after the official notes of 2024"
    leaves = (
        "W1: all tensors of the two-task network (weights, BatchNorm statistics and counters)",
        "W0: the tensor `sites`, a number that the server sets",
        *COMMON_LEAVES,
    )
    personal = True
    needs_all = True
    only_updates = False
    Settings = PersonalizedSettings
    settings: PersonalizedSettings

    def __init__(self, settings: PersonalizedSettings | None = None, training: TrainingSettings | None = None):
        super().__init__(settings, training)
        self.uses_anchor = self.settings.use_sat

    def network(self, weights: str) -> nn.Module:
        model = paired_network(self.settings, self.training, weights)
        model.register_buffer(SITES, torch.zeros((), dtype=torch.int64))
        return model

    def own_names(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(model.state_dict())  # a received state is mixed with the own one

    def receive(self, model: nn.Module, shared_state: Mapping[str, Tensor]) -> None:
        state, sites = dict(shared_state), int(shared_state[SITES])
        if sites > 1:
            s = self.settings
            own_weight = 2.0 if s.compat_double_own else s.self_weight
            for name, own in model.state_dict().items():
                if name != SITES:
                    mean = shared_state[name].to(own.device)
                    state[name] = personal_mix(own, mean, sites, own_weight, 1 - s.self_weight)
        model.load_state_dict(state)

    def combine(
        self, sent: Mapping[str, Tensor], fused: dict[str, Tensor], memory: dict[str, Tensor], sites: int
    ) -> dict[str, Tensor]:
        return {**fused, SITES: torch.tensor(sites)}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return paired_loss(self.settings, model, batch) if self.uses_anchor else unpaired_loss(model, batch)
