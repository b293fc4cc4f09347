"""Where the voxels of a volume lie in the patient, in the world of NIfTI: mm to the right, the front, the top."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel
import numpy as np

from heterosync.errors import UserError

PLANES = ("sagittal", "coronal", "axial")  # by the world axis along which the slices are stacked
GRID_TOLERANCE = 0.1  # of a voxel: two programs round one header differently
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM and MetaImage count to the left and the back


@dataclass(frozen=True)
class Geometry:
    """`affine` (4, 4) float64 leads from the indices of a voxel to its centre in mm.

    Raises `UserError` for a shape that is no volume and an affine that does not orient three axes.
    """

    shape: tuple[int, ...]
    affine: np.ndarray

    def __post_init__(self) -> None:
        if len(self.shape) != 3:
            raise UserError(
                f"a {len(self.shape)}-D image of shape {_times(self.shape)}: give one 3-D volume, or a DICOM series"
            )
        if min(self.shape) < 2:
            raise UserError(f"shape {_times(self.shape)} is a single slice: give the whole volume")
        linear = self.affine[:3, :3]
        if not np.isfinite(self.affine).all() or abs(np.linalg.det(linear)) < 1e-9 * max(np.abs(linear).max(), 1) ** 3:
            raise UserError("its affine does not place the voxels (zero, equal or NaN axes): export it again")

    @property
    def spacing(self) -> np.ndarray:
        """mm between neighbouring voxels along each array axis."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(0))

    @property
    def millilitres(self) -> float:
        """The volume of a voxel: of a parallelepiped, where slices are skewed."""
        return voxel_millilitres(self.affine)

    @property
    def orientation(self) -> str:
        """Where the array axes lead to: "LPS" is the patient's left, back, top."""
        return "".join(nibabel.aff2axcodes(self.affine))

    @property
    def plane(self) -> str | None:
        """The plane of the slices; None where no axis is much coarser than the others."""
        spacing = self.spacing
        if spacing.max() < 1.5 * np.median(spacing):
            return None
        return PLANES[int(np.abs(self.affine[:3, spacing.argmax()]).argmax())]

    @property
    def corners(self) -> np.ndarray:
        """The centres of the eight outermost voxels in mm, (8, 3)."""
        ends = np.array(np.meshgrid(*((0, length - 1) for length in self.shape), indexing="ij")).reshape(3, -1)
        return (self.affine[:3, :3] @ ends).T + self.affine[:3, 3]

    def resampled_shape(self, spacing: float) -> tuple[int, ...]:
        """The shape at `spacing` mm in canonical order, the outermost voxels in their places, to rounding."""
        here = self.canonical()
        extent = (np.array(here.shape) - 1) * here.spacing
        return tuple(int(steps) + 1 for steps in np.round(extent / spacing))

    def canonical(self) -> Geometry:
        """The same voxels in the array order that comes nearest to right, front, top (RAS)."""
        axes = nibabel.io_orientation(self.affine)
        order = np.argsort(axes[:, 0])
        affine = self.affine @ nibabel.orientations.inv_ornt_aff(axes, self.shape)
        return Geometry(tuple(self.shape[axis] for axis in order), affine)

    def in_canonical_order(self, values: np.ndarray) -> np.ndarray:
        """`values` of the voxels (the shape of this grid) in the array order of `canonical`."""
        return np.asarray(nibabel.apply_orientation(values, nibabel.io_orientation(self.affine)))

    def without_noise(self) -> np.ndarray:
        """The affine with axes at right angles and a spacing to 0.00001 mm, unless that moves a voxel noticeably.

        A NIfTI header holds 32-bit numbers. By that noise alone, MONAI's `Spacing` finds no common corner of
        an oblique grid and its resampled one, and moves the latter by up to half a slice.
        """
        left, _, right = np.linalg.svd(self.affine[:3, :3] / self.spacing)
        clean = self.affine.copy()
        clean[:3, :3] = left @ right * np.round(self.spacing, 5)
        moved = np.linalg.norm(Geometry(self.shape, clean).corners - self.corners, axis=1).max()
        return clean if moved < 0.05 * self.spacing.min() else self.affine

    def mismatch(self, other: Geometry) -> str | None:
        """How another grid differs from this one, None when it has the same voxels (in any array order)."""
        here, there = self.canonical(), other.canonical()
        if here.shape != there.shape:
            return f"has {_times(there.shape)} voxels, the image {_times(here.shape)} (right, front, top)"
        apart = float(np.linalg.norm(here.corners - there.corners, axis=1).max())
        if apart > GRID_TOLERANCE * float(self.spacing.min()):
            return f"lies up to {apart:.3g} mm beside the image"
        return None


def voxel_millilitres(affine: np.ndarray) -> float:
    """The volume of a voxel in ml, by the affine (4, 4) in mm."""
    return abs(float(np.linalg.det(affine[:3, :3]))) / 1000


def _times(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers)) or "()"
