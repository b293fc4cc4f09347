"""Train-time augmentation: rotation within +-15 degrees and a horizontal flip with chance 1/2 (official code).

Whole batches at once, one angle and flip per image; values stay in [0, 1], no normalisation. The published code calls
torchvision's RandomRotation(15), whose default takes the nearest pixel and fills with black; so does this.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

MAX_ANGLE = 15.0


def draw_augmentation(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Angles in degrees (count,) and flips (count,) of bool."""
    return rng.uniform(-MAX_ANGLE, MAX_ANGLE, count), rng.random(count) < 0.5


def augment(images: Tensor, angles: np.ndarray, flips: np.ndarray) -> Tensor:
    """Rotate counter-clockwise by `angles` degrees, mirror where `flips`; square images (b, c, s, s) -> same shape."""
    radians = np.deg2rad(angles)
    cos, sin = np.cos(radians), np.sin(radians)
    mirror = np.where(flips, -1.0, 1.0)
    zero = np.zeros_like(cos)
    # row 1 and 2 map an output place (x, y) to the input place it is taken from
    matrix = np.stack([np.stack([cos * mirror, -sin, zero], 1), np.stack([sin * mirror, cos, zero], 1)], 1)
    theta = torch.from_numpy(matrix).to(images.dtype).to(images.device)  # not every device has float64
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, mode="nearest", padding_mode="zeros", align_corners=False)
