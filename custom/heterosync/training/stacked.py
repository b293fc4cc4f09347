"""Deep Stacked Transformation: nine transformations one upon the other, each with chance 1/2.

Zhang et al., "Generalizing deep learning for medical image segmentation to unseen domains via deep stacked
transformation", IEEE TMI 2020, arXiv 1906.03347; for images of zero mean and unit variance. The ranges are those of
public re-implementations that cite it, which agree (docs/prostate.md). Everything random comes from one generator, so
that a patch depends on its stream alone (seeds.py); MONAI's transforms do the work. [R]: rotation, scaling and
deformation are one grid, so that image and mask are interpolated once; magnification is alike along all axes.
"""

from __future__ import annotations

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


def apply_stack(image: Tensor, mask: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Image and mask, float32 (1, x, y, z) -> the same shapes; the mask stays one of 0 and 1."""
    from monai.transforms import AdjustContrast, GaussianSharpen, GaussianSmooth

    chosen, rng = draw.parameters, np.random.default_rng(draw.seed)
    if "sharpness" in chosen:
        image = GaussianSharpen(*chosen["sharpness"][:3])(image)
    if "blur" in chosen:
        image = GaussianSmooth(*chosen["blur"])(image)
    if "noise" in chosen:
        noise = rng.standard_normal(tuple(image.shape), dtype=np.float32)
        image = image + torch.from_numpy(noise).to(image.device) * chosen["noise"][0]
    if "brightness" in chosen:
        image = image + chosen["brightness"][0]
    if "contrast" in chosen:
        image = AdjustContrast(*chosen["contrast"])(image)
    if "perturb" in chosen:
        scale, shift = chosen["perturb"]
        image = image * (1 + scale) + shift
    if chosen.keys() & {"rotation", "scaling", "deformation"}:
        image, mask = _move(image, mask, chosen, rng)
    return _plain(image), _plain(mask)


def _move(
    image: Tensor, mask: Tensor, chosen: dict[str, tuple[float, ...]], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    from monai.networks.layers import GaussianFilter
    from monai.transforms import AffineGrid, Resample
    from monai.transforms.utils import create_grid

    shape, device = tuple(image.shape[1:]), image.device
    grid = create_grid(shape, device=device, backend="torch", dtype=np.float32)
    if "deformation" in chosen:
        sigma, magnitude = chosen["deformation"]
        field = torch.from_numpy(rng.uniform(-1, 1, (3, *shape)).astype(np.float32)).to(device)
        grid[:3] += GaussianFilter(3, sigma, 3.0).to(device)(field[None])[0] * magnitude
    angles = tuple(np.deg2rad(chosen.get("rotation", (0.0, 0.0, 0.0))).tolist())
    size = 1 / chosen["scaling"][0] if "scaling" in chosen else 1.0  # a grid that spans more shows things smaller
    grid, _ = AffineGrid(rotate_params=angles, scale_params=(size,) * 3, device=device)(grid=grid)
    # Mirrored at the border, both alike: an organ that a patch cuts off goes on in image and mask.
    resample = Resample(padding_mode="reflection", dtype=np.float32)
    return resample(image, grid, mode="bilinear"), resample(mask, grid, mode="nearest")


def _plain(value: Tensor) -> Tensor:
    """Without MONAI's meta data."""
    return value.as_tensor() if hasattr(value, "as_tensor") else value  # type: ignore[no-any-return]
