"""The learning rate over the global epoch, counted through all rounds (paper, Model development)."""

from __future__ import annotations

import math

from heterosync.training.settings import TrainingSettings


def lr_at(global_epoch: int, settings: TrainingSettings) -> float:
    """Learning rate of epoch `round * local_epochs + epoch`.

    cosine         floor + (lr - floor) / 2 * (1 + cos(pi e / period)): falls for one period, rises for the next [C]
    warm_restart   the same, with e starting anew every period (the other reading of "period")
    constant       lr
    """
    if settings.schedule == "constant":
        return settings.lr
    period = settings.schedule_period
    e = global_epoch % period if settings.schedule == "warm_restart" else global_epoch
    return settings.lr_floor + (settings.lr - settings.lr_floor) / 2 * (1 + math.cos(math.pi * e / period))
