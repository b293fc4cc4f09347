"""Settings that methods have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heterosync.training import Settings as BaseSettings
from heterosync.training import setting


@dataclass(frozen=True)
class NoSettings(BaseSettings):
    """For methods without hyper-parameters of their own."""

    what: ClassVar[str] = "method"


@dataclass(frozen=True)
class SampleWeights(BaseSettings):
    """For methods whose papers weigh sites by their number of training images."""

    weighting: str = setting("samples", "[M] n_k / n; equal: 1 / K", choices=("samples", "equal"))


@dataclass(frozen=True)
class EqualWeights(BaseSettings):
    """For methods whose papers or official codes give every site the same weight."""

    weighting: str = setting("equal", "[M]/[C] 1 / K; samples: n_k / n", choices=("equal", "samples"))
