"""The learning methods by name. A new method is one file and one line in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heterosync.errors import UserError, nearest
from heterosync.methods.base import Method, bytes_per_image, bytes_per_round, traffic
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
from heterosync.methods.prostate_ahnet import ProstateAHNet
from heterosync.methods.prostate_finetune import ProstateFinetune
from heterosync.methods.prostate_private import ProstatePrivate
from heterosync.methods.scaffold import Scaffold
from heterosync.methods.splitavg import SplitAVG
from heterosync.training import LoopSettings, settings_from

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
    SplitAVG,
    Local,
    Central,
    ProstateAHNet,
    ProstatePrivate,
    ProstateFinetune,
)

__all__ = [
    "METHODS",
    "Method",
    "bytes_per_image",
    "bytes_per_round",
    "get_method",
    "make_method",
    "method_names",
    "traffic",
]


def method_names() -> list[str]:
    return [method.name for method in METHODS]


def get_method(name: str) -> type[Method]:
    """The class of a method. Raises `UserError` with the nearest name."""
    for method in METHODS:
        if method.name == name:
            return method
    raise UserError(f"there is no method '{name}': {nearest(name, method_names())}")


def make_method(
    name: str,
    settings: Mapping[str, Any] | None = None,
    training: LoopSettings | Mapping[str, Any] | None = None,
) -> Method:
    """A method with checked hyper-parameters; `training` may be a job's mapping, which the method's task understands.

    Raises `UserError` for an unknown name or setting.
    """
    method = get_method(name)
    if not isinstance(training, LoopSettings):
        training = method.task.Settings.from_dict(training)
    elif not isinstance(training, method.task.Settings):
        raise TypeError(f"method {name} trains with {method.task.Settings.__name__}, not {type(training).__name__}")
    return method(settings_from(method.Settings, settings), training)
