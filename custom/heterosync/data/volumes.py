"""One volume from a file or folder: NIfTI, MetaImage or a DICOM series.

In two steps, so that its size can be judged before memory is taken: `open_volume` reads headers, `read` the values.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np

from heterosync.data.dicom_series import series_geometry, series_values
from heterosync.data.metaimage import read_header, read_values
from heterosync.data.volume_geometry import Geometry
from heterosync.errors import UserError
from heterosync.files import write_bytes

NIFTI, METAIMAGE = (".nii", ".nii.gz"), (".mhd", ".mha")


@dataclass(frozen=True)
class Volume:
    """An opened volume. `name` stands for it in messages."""

    name: str
    geometry: Geometry
    values: Callable[[], np.ndarray]

    def read(self) -> np.ndarray:
        """The values (x, y, z) in the file's own number type, floating point where the header scales them.

        Raises `UserError` when the file is damaged or holds NaN or infinite values.
        """
        with explaining(self.name):
            values = self.values()
            if values.dtype.kind not in "iufb":
                raise UserError(f"has values of type {values.dtype}, not grey numbers: export one channel")
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise UserError("has NaN or infinite values: export it again")
            return values


def open_volume(path: Path | str, name: str | None = None, channel: int | None = None) -> Volume:
    """Open NIfTI, MetaImage (.mhd, .mha) or a folder with the files of one DICOM series; reads headers alone.

    `channel` picks one volume of a 4-D NIfTI. Raises `UserError`, starting with `name`, for what is no volume.
    """
    path = Path(path)
    name = name or path.name
    with explaining(name):
        if path.is_dir():
            series = series_geometry(path)
            return Volume(name, series.geometry, lambda: series_values(series))
        if not path.is_file():
            raise UserError("does not exist: copy it there or correct the name")
        if path.stat().st_size == 0:
            raise UserError("is empty (0 bytes): copy it again")
        if path.name.lower().endswith(NIFTI):
            return _open_nifti(path, name, channel)
        if path.name.lower().endswith(METAIMAGE):
            header = read_header(path)
            return Volume(name, header.geometry, lambda: read_values(header))
        raise UserError("unknown format: use .nii.gz, .nii, .mhd, .mha or the folder of one DICOM series")


def write_nifti(path: Path, values: np.ndarray, affine: np.ndarray) -> None:
    """Write a volume as `.nii.gz`, whole or not at all: the same bytes for the same values. bool becomes uint8, numbers
    of 64 bits become ones of 32."""
    narrow = {"b": np.uint8, "i": np.int32, "u": np.uint32, "f": np.float32}
    if values.dtype.kind == "b" or values.dtype.itemsize not in (1, 2, 4) or values.dtype == np.float16:
        values = values.astype(narrow[values.dtype.kind])
    image = nibabel.Nifti1Image(values, affine)
    image.header.set_xyzt_units("mm")
    for place in (image.set_sform, image.set_qform):
        place(affine, code="scanner")
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=5, mtime=0))


def _open_nifti(path: Path, name: str, channel: int | None) -> Volume:
    image = nibabel.load(path)
    if not isinstance(image, nibabel.Nifti1Image):  # Nifti2Image is one, too
        raise UserError("not a NIfTI file of its own: save it as .nii.gz")
    if not (image.header["sform_code"] or image.header["qform_code"]):
        raise UserError("its header does not tell the orientation (sform and qform code 0): export it again")
    shape = image.shape
    if channel is not None and len(shape) == 4:
        if channel >= shape[3]:
            raise UserError(f"has {shape[3]} channels, not one of number {channel}: choose another")
        part: tuple = (..., channel)
    else:
        part = (..., *(0 for _ in shape[3:])) if all(length == 1 for length in shape[3:]) else ()
    shape = shape[:3] if part else shape
    geometry = Geometry(tuple(map(int, shape)), np.asarray(image.affine, dtype=np.float64))
    return Volume(name, geometry, lambda: np.asarray(image.dataobj[part]))


@contextmanager
def explaining(name: str) -> Iterator[None]:
    """Turn whatever reading raises into a `UserError` of one line that starts with `name`."""
    try:
        yield
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(f"{name}: ") else f"{name}: {text}") from error
    except PermissionError as error:
        raise UserError(f"{name}: no permission to read it: change its owner or mode") from error
    except MemoryError:
        raise
    except Exception as error:  # damaged files make readers raise anything: struct.error, zlib.error, ImageFileError
        cause = " ".join(str(error).split()).split("/")[-1][:160] or type(error).__name__
        raise UserError(f"{name}: truncated or damaged ({cause}): copy or export it again") from error
