"""The learning methods by name. A new method is one file and one line in `GROUPS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heterosync.errors import UserError, nearest
from heterosync.methods.adafedprox import AdaFedProx
from heterosync.methods.base import Method
from heterosync.methods.central import Central
from heterosync.methods.clip import Clip
from heterosync.methods.ditto import Ditto
from heterosync.methods.fedadam import FedAdam
from heterosync.methods.fedavg import FedAvg
from heterosync.methods.fedbn import FedBN
from heterosync.methods.fedcome import FedCOME
from heterosync.methods.feddps import FedDPS
from heterosync.methods.feddys import FedDyS
from heterosync.methods.fedktl import FedKTL
from heterosync.methods.fedopt import FedOpt
from heterosync.methods.fedppkt import FedPPKT
from heterosync.methods.fedprox import FedProx
from heterosync.methods.fedrcl import FedRCL
from heterosync.methods.fedtp import FedTP
from heterosync.methods.hsl import HSL
from heterosync.methods.hsl_distill import HSLDistill
from heterosync.methods.hsl_norm import HSLNorm
from heterosync.methods.hsl_shared import HSLShared
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
from heterosync.methods.swarm import Swarm
from heterosync.methods.traffic import bytes_per_image, bytes_per_round, traffic
from heterosync.training import LoopSettings, settings_from

#: What `heterosync job list` and docs/methods.md put together; the order is that of every list of methods.
GROUPS: dict[str, tuple[type[Method], ...]] = {
    "HeteroSync Learning": (
        HSL,
        NoSAT,
        NoAL,
        HSLShared,
        HSLNorm,
        HSLDistill,
    ),
    "classical": (
        FedAvg,
        Swarm,
        FedProx,
        FedBN,
        Personalized,
        FedOpt,
        FedAdam,
        Scaffold,
        Ditto,
        Moon,
        SplitAVG,
    ),
    "of 2024": (
        FedPPKT,
        FedKTL,
        FedTP,
        AdaFedProx,
        FedRCL,
        FedCOME,
        FedDPS,
        FedDyS,
    ),
    "foundation model": (Clip,),
    "reference": (
        Local,
        Central,
    ),
    "volumes": (
        ProstateAHNet,
        ProstatePrivate,
        ProstateFinetune,
    ),
}

METHODS: tuple[type[Method], ...] = tuple(method for group in GROUPS.values() for method in group)

__all__ = [
    "GROUPS",
    "METHODS",
    "Method",
    "bytes_per_image",
    "bytes_per_round",
    "get_method",
    "group_of",
    "make_method",
    "method_names",
    "traffic",
]


def group_of(name: str) -> str:
    """The group of a method."""
    return next(group for group, methods in GROUPS.items() if get_method(name) in methods)


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
        training = method.recipe(training)
    elif not isinstance(training, method.task.Settings):
        raise TypeError(f"method {name} trains with {method.task.Settings.__name__}, not {type(training).__name__}")
    return method(settings_from(method.Settings, settings), training)
