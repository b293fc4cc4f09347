"""What each site sent in a round, as a method's `fuse` sees it at the server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answer:
    """One site's contribution; `answer[name]` reads a tensor when it is asked for, since models may wait on disk.

    samples: number of training images. scalars: all that the site reported in the round. weight: by the method's
    `weighting`, 1 in sum over the answers of a round. share: the same before it was divided by that sum (1, the number
    of images, or the score). names: of the tensors that came.
    """

    samples: int
    scalars: Mapping[str, float]
    weight: float
    share: float
    names: tuple[str, ...]
    read: Callable[[str], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        """A fresh tensor on the CPU."""
        return self.read(name)


def mean(answers: Mapping[str, Answer], name: str, weights: Mapping[str, float] | None = None) -> Tensor:
    """The mean of one tensor over the answers, in float64, cast back; integers are rounded to the nearest.

    weights: by site, their sum above 0; by default the method's weighting, which gives the mean of the other methods
    (federation/fusion.py) to the last bit.
    """
    total = torch.zeros((), dtype=torch.float64)
    for site, answer in answers.items():
        value = answer[name]
        kind, weight = value.dtype, answer.share if weights is None else weights[site]
        total = total + (value.double() if weight == 1.0 else value.double() * weight)
    total = total / sum(answer.share if weights is None else weights[site] for site, answer in answers.items())
    return (total if kind.is_floating_point else total.round()).to(kind)
