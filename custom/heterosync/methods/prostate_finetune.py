"""Private fine-tuning of a received segmentation model with Learning without Forgetting (Li and Hoiem 2017)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from heterosync.errors import UserError
from heterosync.methods.base import VOLUME_LEAVES, Method
from heterosync.training import SEGMENTATION, Batch, Examples, Settings, VolumeSettings, setting


@dataclass(frozen=True)
class FinetuneSettings(Settings):
    what: ClassVar[str] = "prostate_finetune"

    distillation: float = setting(1.0, "[M] lambda_o, 1 in most of its experiments; 0: plain fine-tuning", low=0.0)
    temperature: float = setting(2.0, "[M] T, from a grid search", low=1.0)

    def idle(self) -> dict[str, str]:
        return {} if self.distillation else {"temperature": "distillation above 0"}


@dataclass(frozen=True)
class FinetuneTraining(VolumeSettings):
    lr: float = setting(1e-5, "[R] a tenth of the default 1e-4: small, as [M] advises", low=1e-12)


class ProstateFinetune(Method):
    """The step that Sarma et al., JAMIA 2021, Discussion, name as future work: each site goes on alone from the
    federated model, by Li Z. and Hoiem D., "Learning without forgetting", IEEE TPAMI 40(12), 2018, arXiv 1606.09282.

        site k:  min  soft Dice loss(w_k) + lambda_o mean over voxels of -q log p - (1 - q) log(1 - p)
                 p = sigmoid(z / T), q = sigmoid(z_o / T),   from w_k = w_o

    z, z_o: logits of a patch of site k by the model being trained and by the received one, w_o, which stays frozen;
    equations 2 to 4 of the paper for two classes, of which q^(1/T) / (q^(1/T) + (1 - q)^(1/T)) is the sigmoid above.
    No volume of another site is needed. The paper adds an output for a new task; here the task stays and the scanner
    changes, so that both terms see the same output [R]. The received model's outputs are those of the augmented patch.

    The setting `weights` of the training names the received model's file (a best_model.pt). The learning rate is
    1e-5, a tenth of the default 1e-4 [R]: the paper's advice is a small one.
    Sent: no tensor.

    Degenerates: with distillation = 0 into `prostate_private` from the received model, plain fine-tuning.
    """

    name = "prostate_finetune"
    title = "Fine-tuned 3D AH-Net"
    status = "reconstruction"
    citation = "Li Z. and Hoiem D., IEEE TPAMI 40(12), 2018, arXiv 1606.09282"
    leaves = VOLUME_LEAVES
    task = SEGMENTATION
    weighting = "none"
    personal = True
    goes_on = True
    Settings = FinetuneSettings
    Training = FinetuneTraining
    settings: FinetuneSettings
    training: VolumeSettings
    _received: nn.Module | None = None

    def build_model(self, weights: str | None = None) -> nn.Module:
        if weights is None and self.training.weights == "none":
            line = "method prostate_finetune goes on from a model that the site received"
            raise UserError(f"{line}: set training setting 'weights' to the name of its file, e.g. best_model.pt")
        return super().build_model(weights)

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        if self.settings.distillation and self._received is None:
            here = next(model.parameters()).device
            self._received = self.build_model().to(here).requires_grad_(False).eval()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.images)
        loss = self.task.loss(logits, batch.labels)
        if self._received is None:
            return loss
        with torch.no_grad():
            before = self._received(batch.images)
        return loss + self.settings.distillation * forgetting(logits, before, self.settings.temperature)


def forgetting(logits: Tensor, before: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of the softened outputs against those of before, mean over voxels, in float32; without gradient
    where both are the same."""
    with torch.autocast(logits.device.type, enabled=False):
        return bce(logits.float() / temperature, torch.sigmoid(before.float() / temperature))
