"""One DICOM series of single slices as a volume: ordered by position, and refused when it is not whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import apply_modality_lut

from heterosync.data.dicom import decoded_pixels
from heterosync.data.volume_geometry import LPS_TO_RAS, Geometry
from heterosync.errors import UserError

_TAGS = ("Rows", "Columns", "PixelSpacing", "ImagePositionPatient", "ImageOrientationPatient")
_READ = [*_TAGS, "SeriesInstanceUID", "SeriesDescription", "SeriesNumber", "NumberOfFrames"]
UNEVEN = 0.1  # of the distance of two slices, the most by which one may lie off its place


@dataclass(frozen=True)
class Series:
    """The files of a series in the order of their slices, and its SeriesNumber."""

    files: tuple[Path, ...]
    geometry: Geometry
    number: int


def series_geometry(folder: Path) -> Series:
    """Read the headers of all DICOM files of `folder`; other files are passed over.

    Raises `UserError` when they are of several series, are no image slices, overlap, or when slices are missing between
    them. Slices missing at an end leave no trace in the others: the mask's shape tells.
    """
    headers = _headers(folder)
    if len({header.get("SeriesInstanceUID") for header in headers.values()}) > 1:
        raise UserError("holds files of several DICOM series: give each series its own folder")
    for path, header in headers.items():
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise UserError(f"{path.name} is an enhanced DICOM file of many slices: convert it to NIfTI")
        lacking = [tag for tag in _TAGS if header.get(tag) is None]
        if lacking:
            raise UserError(f"{path.name} has no {lacking[0]}: it is no slice of a volume; take it out of the folder")
    first = next(iter(headers.values()))
    for path, header in headers.items():
        for tag in ("Rows", "Columns", "PixelSpacing", "ImageOrientationPatient"):
            if not np.allclose(_numbers(header, tag), _numbers(first, tag), atol=1e-3):
                raise UserError(f"{path.name} has another {tag} than the other slices: take it out of the folder")
    across, down = np.split(_numbers(first, "ImageOrientationPatient"), 2)
    normal = np.cross(across, down)
    places = {path: _numbers(header, "ImagePositionPatient") for path, header in headers.items()}
    files = sorted(places, key=lambda path: (float(places[path] @ normal), path.name))
    positions = np.array([places[path] for path in files])
    _check_stack(files, positions, positions @ normal)

    affine = np.eye(4)
    by_row, by_column = _numbers(first, "PixelSpacing")
    step = (positions[-1] - positions[0]) / (len(files) - 1)
    affine[:3] = np.stack([across * by_column, down * by_row, step, positions[0]], axis=1)
    shape = (int(first.Columns), int(first.Rows), len(files))
    geometry = Geometry(shape, LPS_TO_RAS @ affine)
    return Series(tuple(files), geometry, int(first.get("SeriesNumber") or 0))


def series_values(series: Series) -> np.ndarray:
    """The values (x, y, z) after the rescaling that each file names; float32 where that is not by whole numbers."""
    slices = []
    for path in series.files:
        dataset = pydicom.dcmread(path)
        if "PixelData" not in dataset:
            raise UserError(f"{path.name} holds no image: export the series again")
        pixels = decoded_pixels(dataset)
        if pixels.ndim != 2:
            raise UserError(f"{path.name} is a colour image: take it out of the folder")
        slices.append(np.asarray(apply_modality_lut(pixels, dataset)).T)
    values = np.stack(slices, axis=-1)
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def _headers(folder: Path) -> dict[Path, pydicom.Dataset]:
    headers = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith(".") or path.name == "DICOMDIR":
            continue
        try:
            headers[path] = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_READ)
        except pydicom.errors.InvalidDicomError:
            continue
    if not headers:
        raise UserError("the folder holds no DICOM file: give the folder of one series, or a NIfTI file")
    if len(headers) == 1 and int(next(iter(headers.values())).get("NumberOfFrames") or 1) == 1:
        raise UserError("the folder holds a single DICOM slice: give the whole series")
    return headers


def _check_stack(files: list[Path], positions: np.ndarray, heights: np.ndarray) -> None:
    """That the slices lie one step apart each: `heights` are their places in mm along the normal, ascending."""
    steps = np.diff(heights)
    for i in np.flatnonzero(steps < 1e-3):
        raise UserError(f"{files[i].name} and {files[i + 1].name} show the same slice: keep one of them")
    step = float(np.median(steps))
    for i in np.flatnonzero(steps > (1 + 2 * UNEVEN) * step):
        lost = round(float(steps[i] / step)) - 1
        what = f"{lost} slices are missing" if lost > 1 else "a slice is missing" if lost else "the distance changes"
        raise UserError(f"{what} between {files[i].name} and {files[i + 1].name}: export the whole series again")
    even = positions[0] + np.linspace(0, 1, len(files))[:, None] * (positions[-1] - positions[0])
    apart = np.linalg.norm(positions - even, axis=1)
    if apart.max() > UNEVEN * step:
        raise UserError(f"{files[int(apart.argmax())].name} lies beside the stack of the others: export it again")


def _numbers(header: pydicom.Dataset, tag: str) -> np.ndarray:
    return np.atleast_1d(np.asarray(header.get(tag), dtype=np.float64))


def series_header(folder: Path) -> tuple[str, int | None]:
    """Description and number of the series of the first DICOM file of a folder; "" and None without one."""
    for path in sorted(folder.iterdir()):
        try:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_READ)
        except (pydicom.errors.InvalidDicomError, OSError):
            continue
        number = header.get("SeriesNumber")
        return str(header.get("SeriesDescription", "")), None if number is None else int(number)
    return "", None
