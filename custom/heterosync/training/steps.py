"""The optimiser steps of one local epoch, with a guard against steps that are not finite."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from heterosync import pulse
from heterosync.errors import SiteError, UserError
from heterosync.training.batches import Batch
from heterosync.training.learner import Learner
from heterosync.training.precision import autocast
from heterosync.training.seeds import seed_of
from heterosync.training.settings import LoopSettings

#: this many steps in a row without a finite loss and gradient end the training
MAX_SKIPPED = 5


def make_optimizer(model: nn.Module, settings: LoopSettings) -> torch.optim.Optimizer:
    """Adam, AdamW or plain SGD over all parameters, as the settings say."""
    parameters = list(model.parameters())
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    fused = parameters[0].device.type in ("cpu", "cuda")
    return kind(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=fused)


@dataclass(frozen=True)
class EpochOutcome:
    loss: float  # mean over the items of the applied steps
    steps: int
    skipped: int


class Buffers:
    """The model's buffers before a step: a forward pass moves BatchNorm's statistics also when the step is skipped."""

    def __init__(self, model: nn.Module):
        by_type: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            by_type.setdefault(buffer.dtype, []).append(buffer)
        self._pairs = [(own, [buffer.clone() for buffer in own]) for own in by_type.values()]

    def keep(self) -> None:
        for own, kept in self._pairs:
            torch._foreach_copy_(kept, own)  # one call per type: a ResNet has 60 small buffers

    def restore(self) -> None:
        with torch.no_grad():
            for own, kept in self._pairs:
                torch._foreach_copy_(own, kept)


@dataclass
class Steps:
    """Runs epochs of one site; `where` names it in errors."""

    learner: Learner
    model: nn.Module
    site: str
    device: torch.device
    precision: str

    def run(self, batches: Iterable[Batch], optimizer: torch.optim.Optimizer, round_: int, epoch: int) -> EpochOutcome:
        """One pass over `batches`; dropout draws from a stream of (seed, site, round, epoch) alone.

        Raises `UserError` where no step can be made; without a batch there is none to make.
        """
        torch.manual_seed(seed_of(self.learner.training.seed, self.site, round_, epoch, "dropout"))
        self.model.train()
        buffers = Buffers(self.model)
        total, items, steps, skipped, in_a_row = 0.0, 0, 0, 0, 0
        for batch in batches:
            pulse.beat()
            loss, count = self._step(batch, optimizer, buffers), len(batch.images)
            if loss is None:
                skipped, in_a_row = skipped + 1, in_a_row + 1
                if in_a_row >= MAX_SKIPPED:
                    raise self._diverged(round_, f"{in_a_row} steps in a row")
                continue
            total, items, steps, in_a_row = total + loss * count, items + count, steps + 1, 0
        if skipped and not steps:
            raise self._diverged(round_, "every step of an epoch")
        return EpochOutcome(total / max(items, 1), steps, skipped)

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer, buffers: Buffers) -> float | None:
        """One optimiser step; its loss, or None when loss or gradient were not finite: the model is then as before."""
        buffers.keep()
        optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.precision):
            loss = self.learner.loss(self.model, batch)
        loss.backward()
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        value, size = torch.stack([loss.detach().float(), norm.float()]).tolist()
        if not (abs(value) < float("inf") and size < float("inf")):  # also false for NaN
            buffers.restore()
            return None
        self.learner.correct_gradients(self.model)
        optimizer.step()
        return value

    def _diverged(self, round_: int, what: str) -> UserError:
        lr = self.learner.training.lr
        return SiteError(
            f"site {self.site}, round {round_}: {what} had no finite loss or gradient; "
            f"lower training setting 'lr' ({lr}) or set 'precision' to float32"
        )
