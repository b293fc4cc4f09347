"""The learning rate by global epoch, counted through all rounds (paper, Model development), or by what is reached."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch


def lr_at(global_epoch: int, settings: Any, reached: Sequence[float] = ()) -> float:
    """Learning rate of epoch `round * local_epochs + epoch`, after epochs with the validation values `reached`.

    cosine         floor + (lr - floor) / 2 * (1 + cos(pi e / period)): falls for one period, rises for the next [C]
    warm_restart   the same, with e starting anew every period (the other reading of "period")
    constant       lr
    plateau        lr times lr_factor each time that lr_patience epochs in a row brought no new best value, down to the
                   floor: torch's ReduceLROnPlateau on the site's own validation values, over all rounds
    """
    if settings.schedule == "constant":
        return float(settings.lr)
    if settings.schedule == "plateau":
        return _after_plateaus(settings, reached)
    period = settings.schedule_period
    e = global_epoch % period if settings.schedule == "warm_restart" else global_epoch
    return settings.lr_floor + (settings.lr - settings.lr_floor) / 2 * (1 + math.cos(math.pi * e / period))


def _after_plateaus(settings: Any, reached: Sequence[float]) -> float:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.lr)
    rule = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", settings.lr_factor, settings.lr_patience, threshold=0.0, min_lr=settings.lr_floor
    )
    for value in reached:
        rule.step(value)
    return float(optimizer.param_groups[0]["lr"])
