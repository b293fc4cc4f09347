"""Deep Stacked Transformation: nine transformations one upon the other, each with chance 1/2.

Zhang et al., "Generalizing deep learning for medical image segmentation to unseen domains via deep stacked
transformation", IEEE TMI 2020, arXiv 1906.03347; for images of zero mean and unit variance. The ranges are those of
public re-implementations that cite it, which agree (docs/prostate.md). Everything random comes from one generator, so
that a patch depends on its stream alone (seeds.py); MONAI's transforms do the work. [R]: rotation, scaling and
deformation are one grid, so that image and mask are interpolated once; magnification is alike along all axes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

#: Chance of each transformation.
PROBABILITY = 0.5

#: name -> ranges that its parameters are drawn from, uniformly, in this order.
RANGES: dict[str, tuple[tuple[float, float], ...]] = {
    "sharpness": ((0.25, 1.5), (0.25, 1.5), (10.0, 30.0)),  # sigma of both Gaussians in voxels, strength
    "blur": ((0.25, 1.5),),  # sigma in voxels
    "noise": ((0.1, 1.0),),  # standard deviation
    "brightness": ((-0.1, 0.1),),  # added
    "contrast": ((0.5, 4.5),),  # gamma
    "perturb": ((-0.1, 0.1), (-0.1, 0.1)),  # x -> x (1 + a) + b
    "rotation": ((-20.0, 20.0),) * 3,  # degrees about x, y, z
    "scaling": ((0.4, 1.6),),  # magnification
    "deformation": ((10.0, 13.0), (0.0, 1000.0)),  # sigma in voxels, magnitude of the smoothed field
}


class Draw(NamedTuple):
    """Parameters by name of the transformations that a patch gets, and the seed of its noise and deformation."""

    parameters: dict[str, tuple[float, ...]]
    seed: int


def draw_stack(rng: np.random.Generator) -> Draw:
    """Draw for one patch; as many numbers are taken whatever is applied."""
    drawn = {}
    for name, ranges in RANGES.items():
        used = rng.random() < PROBABILITY
        values = tuple(float(rng.uniform(low, high)) for low, high in ranges)
        if used:
            drawn[name] = values
    return Draw(drawn, int(rng.integers(2**63)))


class Stack:
    """What `draw` does to a patch of the size `shape`, for whose transformations of space more is seen than the patch.

    margin: voxels along x, y, z beyond the patch on both of its sides that it takes. Without them, what a smaller
    magnification lets in would have to be made up: the organ's mirror images, where anatomy has one organ.
    """

    def __init__(self, draw: Draw, shape: tuple[int, ...], device: torch.device | str = "cpu"):
        self._chosen, self._shape = draw.parameters, tuple(shape)
        self._rng = np.random.default_rng(draw.seed)
        spatial = self._chosen.keys() & {"rotation", "scaling", "deformation"}
        self._grid = self._made_grid(torch.device(device)) if spatial else None
        self.margin = (0, 0, 0) if self._grid is None else self._beyond(self._grid)

    def apply(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Image and mask, float32 (1, x, y, z), of the patch with its margin -> both of the patch's size; the mask
        stays one of 0 and 1. Padding is part of the image: it becomes brighter, darker and as noisy as the rest, or it
        would stand out as a frame."""
        from monai.transforms import AdjustContrast, GaussianSharpen, GaussianSmooth, Resample

        chosen = self._chosen
        if "sharpness" in chosen:
            image = GaussianSharpen(*chosen["sharpness"][:3])(image)
        if "blur" in chosen:
            image = GaussianSmooth(*chosen["blur"])(image)
        if "noise" in chosen:
            noise = self._rng.standard_normal(tuple(image.shape), dtype=np.float32)
            image = image + torch.from_numpy(noise).to(image.device) * chosen["noise"][0]
        if "brightness" in chosen:
            image = image + chosen["brightness"][0]
        if "contrast" in chosen:
            image = AdjustContrast(*chosen["contrast"])(image)
        if "perturb" in chosen:
            scale, shift = chosen["perturb"]
            image = image * (1 + scale) + shift
        if self._grid is not None:
            resample = Resample(padding_mode="zeros", dtype=np.float32)
            image = resample(image, self._grid, mode="bilinear")
            mask = resample(mask, self._grid, mode="nearest")
        return _plain(image), _plain(mask)

    def _made_grid(self, device: torch.device) -> Tensor:
        """Where each voxel of the patch comes from, in voxels from its middle."""
        from monai.networks.layers import GaussianFilter
        from monai.transforms import AffineGrid
        from monai.transforms.utils import create_grid

        chosen = self._chosen
        grid = create_grid(self._shape, device=device, backend="torch", dtype=np.float32)
        if "deformation" in chosen:
            sigma, magnitude = chosen["deformation"]
            field = torch.from_numpy(self._rng.uniform(-1, 1, (3, *self._shape)).astype(np.float32)).to(device)
            grid[:3] += GaussianFilter(3, sigma, 3.0).to(device)(field[None])[0] * magnitude
        angles = tuple(np.deg2rad(chosen.get("rotation", (0.0, 0.0, 0.0))).tolist())
        size = 1 / chosen["scaling"][0] if "scaling" in chosen else 1.0  # a grid that spans more shows things smaller
        grid, _ = AffineGrid(rotate_params=angles, scale_params=(size,) * 3, device=device)(grid=grid)
        return _plain(grid)

    def _beyond(self, grid: Tensor) -> tuple[int, ...]:
        reached = grid[:3].abs().flatten(1).amax(1).tolist()
        return tuple(max(0, math.ceil(far - (side - 1) / 2)) for far, side in zip(reached, self._shape, strict=True))


def _plain(value: Tensor) -> Tensor:
    """Without MONAI's meta data."""
    return value.as_tensor() if hasattr(value, "as_tensor") else value  # type: ignore[no-any-return]
