"""HeteroSync Learning: every site trains its private task beside one shared anchor task; all tensors are averaged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from heterosync.methods.paired import Paired, PairedSettings, paired_loss, paired_network, paired_terms
from heterosync.training import Batch


@dataclass(frozen=True)
class HSLSettings(PairedSettings):
    what: ClassVar[str] = "hsl"


class HSL(Paired):
    """Hu et al. 2025, as the paper and the official code say, without the defects of the 2025 demo (docs/hsl.md).

        site k:  w_k <- local epochs of 1/2 BCE(p_1, y) + 1/2 BCE(p_2, y_anchor) from w      server:  w <- (1/K) sum w_k

    p_1, p_2: the two towers' answers to a private image and an anchor image, seen together. Sent: every tensor of the
    two-task network, 90.6 MiB per round with ResNet18, in each direction.

    Degenerates: with one site into local learning of the two-task network (`local` with `network` mmoe).
    """

    name = "hsl"
    title = "HeteroSync Learning"
    status = "corrected"
    citation = "Hu et al., Nat. Commun. 16, 9416 (2025), doi 10.1038/s41467-025-64459-y"
    uses_anchor = True
    Settings = HSLSettings
    settings: HSLSettings

    def network(self, weights: str) -> nn.Module:
        return paired_network(self.settings, self.training, weights)

    def terms(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss by the task that they come from."""
        return paired_terms(self.settings, model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return paired_loss(self.settings, model, batch)
