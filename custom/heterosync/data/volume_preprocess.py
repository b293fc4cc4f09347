"""From a volume as it was scanned to what the network sees, and from the network's grid back to the scan's.

Federated prostate segmentation (Sarma et al., JAMIA 2021): 1 mm isotropic, zero mean and unit variance. MONAI's
transforms do the work; the axes lead to the right, the front and the top in every case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, NormalizeIntensity, Orientation, Spacing, SpatialResample

from heterosync.data.volume_geometry import Geometry
from heterosync.errors import UserError, nearest

#: The interpolations of an image: MONAI's mode, and what it calls the continuation beyond the border with that mode.
INTERPOLATIONS: dict[str, tuple[str | int, str]] = {"linear": ("bilinear", "border"), "spline": (3, "nearest")}
AXES = (("L", "R"), ("P", "A"), ("I", "S"))


@dataclass(frozen=True)
class Preprocessing:
    """`spacing` in mm, the same along all axes; `interpolation` of images: linear, or spline (cubic)."""

    spacing: float = 1.0
    interpolation: str = "linear"

    def __post_init__(self) -> None:
        if not 0.1 <= self.spacing <= 10:
            raise UserError(f"spacing {self.spacing}: choose 0.1 to 10 mm (the paper has 1)")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation '{self.interpolation}': {nearest(self.interpolation, INTERPOLATIONS)}")

    def image_transform(self) -> Compose:
        """Orientation, resampling and normalisation of a MetaTensor (1, x, y, z)."""
        mode, padding = INTERPOLATIONS[self.interpolation]
        return Compose(
            [
                Orientation(axcodes="RAS", labels=AXES),
                Spacing(pixdim=self.spacing, mode=mode, padding_mode=padding),
                NormalizeIntensity(),
            ]
        )

    def image(self, values: np.ndarray, geometry: Geometry) -> MetaTensor:
        """The network's input, float32 (1, x, y, z), with its affine."""
        return self.image_transform()(meta_tensor(values, geometry))

    def mask(self, values: np.ndarray, geometry: Geometry, grid: MetaTensor) -> torch.Tensor:
        """The organ of a bool mask on the grid of a prepared image: uint8 0 or 1, (1, x, y, z), by nearest voxel."""
        return to_grid(meta_tensor(values, geometry), grid.affine, grid.shape[1:], "nearest").to(torch.uint8)


def meta_tensor(values: np.ndarray, geometry: Geometry) -> MetaTensor:
    """(x, y, z) values as MONAI's float32 (1, x, y, z) with their place."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))[None]
    return MetaTensor(tensor, affine=torch.from_numpy(geometry.without_noise()))


def to_geometry(tensor: torch.Tensor, affine: torch.Tensor, geometry: Geometry, mode: str = "bilinear") -> np.ndarray:
    """What lies on the network's grid, (channels, x, y, z) with that grid's `affine`, at the voxels of a scan.

    Returns float32 (channels, *geometry.shape). `mode` is nearest for masks and bilinear for probabilities; outside the
    grid, where rounding its size left a margin, the outermost value goes on.
    """
    back = to_grid(MetaTensor(tensor, affine=affine), torch.from_numpy(geometry.affine), geometry.shape, mode)
    return np.asarray(back.cpu().numpy())


def to_grid(volume: MetaTensor, affine: torch.Tensor, shape: tuple[int, ...], mode: str) -> torch.Tensor:
    resample = SpatialResample(mode=mode, padding_mode="border")
    return resample(volume, dst_affine=affine, spatial_size=shape).as_tensor()
