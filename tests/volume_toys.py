"""Small volumes and masks in every format, for the tests of segmentation data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
from scipy.spatial.transform import Rotation

from data_toys import write_dicom

SHAPE = (14, 12, 6)
CONFIG = "task: segmentation\n"


def oblique(
    spacing: Sequence[float] = (1.4, 1.4, 3.0),
    angles: Sequence[float] = (8, -6, 15),
    axes: str = "RAS",
    shape: Sequence[int] = SHAPE,
) -> np.ndarray:
    """An affine (4, 4) with turned slices in an array order; the volume's middle is near 0."""
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    signs = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.eye(4)
    for column, (axis, step) in enumerate(zip(axes, spacing, strict=True)):
        world, sign = signs[axis]
        affine[:3, column] = sign * step * turn[:, world]
    affine[:3, 3] = np.array([3.0, -2.0, 5.0]) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def world(affine: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The place of every voxel in mm, (3, x, y, z)."""
    return np.tensordot(affine[:3, :3], np.indices(shape), 1) + affine[:3, 3, None, None, None]


def scan(seed: int = 0, shape: Sequence[int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def organ(shape: Sequence[int] = SHAPE) -> np.ndarray:
    """An unsymmetrical block of ones, away from the borders."""
    mask = np.zeros(shape, np.uint8)
    mask[3:9, 4:8, 2:4] = 1
    return mask


def save_nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = oblique(shape=values.shape) if affine is None else affine
    image = nibabel.Nifti1Image(values, affine)
    image.set_sform(affine, code=1)
    nibabel.save(image, path)
    return path


def header_alone(path: Path, shape: tuple[int, ...], spacing: float) -> None:
    """A NIfTI file whose header promises what its few bytes do not hold: whoever allocates first fails otherwise."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.int16)
    header.set_data_shape(shape)
    header.set_sform(np.diag([spacing] * 3 + [1]), code=1)
    header["vox_offset"] = 352
    path.write_bytes(header.binaryblock + bytes(8))


def save_metaimage(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    """`path` (.mhd) and the .raw beside it, as PROMISE12 has them; MetaImage counts to the left and the back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    kind = {np.dtype(np.int16): "MET_SHORT", np.dtype(np.int8): "MET_CHAR", np.dtype(np.uint8): "MET_UCHAR"}
    lines = {
        "ObjectType": "Image",
        "NDims": 3,
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": "False",
        "TransformMatrix": " ".join(f"{number:.12g}" for number in (lps[:3, :3] / spacing).T.ravel()),
        "Offset": " ".join(f"{number:.12g}" for number in lps[:3, 3]),
        "CenterOfRotation": "0 0 0",
        "ElementSpacing": " ".join(f"{number:.12g}" for number in spacing),
        "DimSize": " ".join(map(str, values.shape)),
        "ElementType": kind[values.dtype],
        "ElementDataFile": f"{path.stem}.raw",
    }
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()))
    path.with_suffix(".raw").write_bytes(values.tobytes(order="F"))
    return path


def save_series(folder: Path, values: np.ndarray, affine: np.ndarray, uid: str = "1.2.3", **tags: object) -> Path:
    """A file per slice, named against the order of the slices."""
    lps = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    across, down = lps[:3, 0] / spacing[0], lps[:3, 1] / spacing[1]
    for number in range(values.shape[2]):
        place = lps[:3, 3] + number * lps[:3, 2]
        write_dicom(
            folder / f"{values.shape[2] - number:03}.dcm",
            np.ascontiguousarray(values[:, :, number].T.astype(np.uint16)),
            PixelSpacing=[float(spacing[1]), float(spacing[0])],
            ImageOrientationPatient=[round(float(part), 12) for part in (*across, *down)],
            ImagePositionPatient=[round(float(part), 9) for part in place],
            SeriesInstanceUID=uid,
            InstanceNumber=number + 1,
            **tags,
        )
    return folder


def write_rows(folder: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("image", "mask")) -> None:
    (folder / "manifest.csv").write_text("".join(",".join(row) + "\n" for row in [header, *rows]))


def volume_site(folder: Path, cases: int = 7, config: str = CONFIG) -> list[list[str]]:
    """A valid site folder; returns the manifest's rows [image, mask]."""
    rows = [[f"images/{number}.nii.gz", f"masks/{number}.nii.gz"] for number in range(cases)]
    for number, (image, mask) in enumerate(rows):
        save_nifti(folder / image, scan(number))
        save_nifti(folder / mask, organ())
    write_rows(folder, rows)
    (folder / "site.yaml").write_text(config)
    return rows
