"""What one site returns in one round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contribution:
    """The answer of `site` to the training of `round` (counted from 0).

    `tensors` holds the shared tensors under their state_dict names (torch tensors or numpy arrays; empty for methods
    whose weights stay at home), `metrics` scalars of the wire's allow-list, `samples` the number of training images.
    """

    site: str
    method: str
    round: int
    tensors: Mapping[str, Any]
    metrics: dict[str, float] = field(default_factory=dict)
    samples: int = 0
