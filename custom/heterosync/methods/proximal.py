"""What methods with a proximal term share (Li T. et al., MLSys 2020, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def proximal_term(parameters: list[Tensor], received: list[Tensor], mu: float) -> Tensor:
    """(mu / 2) ||w - w_g||^2; its gradient is mu (w - w_g)."""
    squares = [(own - there).square().sum() for own, there in zip(parameters, received, strict=True)]
    return mu / 2 * torch.stack(squares).sum()
