"""The learning methods by name. A new method is one file and one line in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heterosync.errors import UserError, nearest
from heterosync.methods.base import Method, bytes_per_round
from heterosync.methods.central import Central
from heterosync.methods.ditto import Ditto
from heterosync.methods.fedadam import FedAdam
from heterosync.methods.fedavg import FedAvg
from heterosync.methods.fedbn import FedBN
from heterosync.methods.fedopt import FedOpt
from heterosync.methods.fedprox import FedProx
from heterosync.methods.hsl import HSL
from heterosync.methods.local import Local
from heterosync.methods.moon import Moon
from heterosync.methods.no_al import NoAL
from heterosync.methods.no_sat import NoSAT
from heterosync.methods.personalized import Personalized
from heterosync.methods.scaffold import Scaffold
from heterosync.training import TrainingSettings, settings_from

METHODS: tuple[type[Method], ...] = (
    HSL,
    NoSAT,
    NoAL,
    FedAvg,
    FedProx,
    FedBN,
    Personalized,
    FedOpt,
    FedAdam,
    Scaffold,
    Ditto,
    Moon,
    Local,
    Central,
)

__all__ = ["METHODS", "Method", "bytes_per_round", "get_method", "make_method", "method_names"]


def method_names() -> list[str]:
    return [method.name for method in METHODS]


def get_method(name: str) -> type[Method]:
    """The class of a method. Raises `UserError` with the nearest name."""
    for method in METHODS:
        if method.name == name:
            return method
    raise UserError(f"there is no method '{name}': {nearest(name, method_names())}")


def make_method(
    name: str, settings: Mapping[str, Any] | None = None, training: TrainingSettings | None = None
) -> Method:
    """A method with checked hyper-parameters. Raises `UserError` for an unknown name or setting."""
    method = get_method(name)
    return method(settings_from(method.Settings, settings), training)
