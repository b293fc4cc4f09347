"""One DICOM image as the uint8 picture that a viewer would show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi, get_decoder
from pydicom.pixels import pixel_array as decode_pixels

from heterosync.data.grey import Window, min_max, through_window, to_uint8, unit_to_uint8
from heterosync.errors import UserError

_MEND = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or convert the file to an uncompressed one"


def read_dicom(path: Path, window: Window | None = None) -> np.ndarray:
    """uint8 (h, w) or, for colour images, (h, w, 3).

    Grey: modality LUT or rescale slope and intercept, then `window` (centre, width) if given, else the file's VOI LUT,
    else its window, else minimum to maximum; MONOCHROME1 is inverted, so that bright means dense in every file.
    Padding (PixelPaddingValue, PixelPaddingRangeLimit) is no part of the picture: it is black, whatever its value.
    Raises `UserError` for multi-frame files, files without an image and
    compressions that no installed decoder handles.
    """
    try:
        dataset = pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError as error:
        raise UserError("not a DICOM file: export it again, or correct its suffix") from error
    if "PixelData" not in dataset:
        raise UserError("the DICOM file holds no image (a report or a structure set?): delete the row")
    frames = int(dataset.get("NumberOfFrames") or 1)
    if frames > 1:
        raise UserError(f"a DICOM file of {frames} frames: export the frame to be classified as a file of its own")
    stored = decoded_pixels(dataset)
    meaning = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
    if meaning == "PALETTE COLOR":
        return _high_byte(apply_color_lut(stored, dataset))
    if stored.ndim == 3:
        return _high_byte(stored)
    padding = _padding(dataset, stored)
    unit = _grey(dataset, np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64), padding, window)
    return unit_to_uint8(np.where(padding, 0, 1 - unit if meaning == "MONOCHROME1" else unit))


def _decodable(syntax: str) -> bool:
    try:
        return get_decoder(syntax).is_available
    except RuntimeError:  # pydicom knows no decoder at all
        return False


def decoded_pixels(dataset: pydicom.Dataset) -> np.ndarray:
    """The stored values; colour comes back as RGB."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not _decodable(syntax):
        raise UserError(f"its compression ({syntax.name}) has no decoder here: {_MEND}")
    try:
        return decode_pixels(dataset)
    except RuntimeError as error:  # each decoder failed; the causes fill several lines
        raise UserError(f"its compression ({syntax.name}) cannot be decoded, or it is damaged: {_MEND}") from error


def _padding(dataset: pydicom.Dataset, stored: np.ndarray) -> np.ndarray:
    """Where stored values are padding: bool, the shape of `stored`. PS3.3 C.7.5.1.1.2."""
    ends = [dataset.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    if ends[0] is None:
        return np.zeros(stored.shape, dtype=bool)
    # many files write the value with the other sign: 63536 for -2000 in 16 bits
    numbers = [np.array(int(end)).astype(stored.dtype) for end in ends if end is not None]
    return (stored >= min(numbers)) & (stored <= max(numbers))


def _grey(dataset: pydicom.Dataset, values: np.ndarray, padding: np.ndarray, window: Window | None) -> np.ndarray:
    """Modality values in [0, 1]."""
    if not np.isfinite(values).all():
        raise UserError("the picture has NaN or infinite values: export it again or delete the row")
    if window is not None:
        return through_window(values, *window)
    if dataset.get("VOILUTSequence"):
        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return apply_voi(values.astype(np.int64), dataset).astype(np.float64) / (2**bits - 1)
    centre, width = _first(dataset.get("WindowCenter")), _first(dataset.get("WindowWidth"))
    if centre is None or width is None or width <= 0:
        return min_max(values, ~padding)
    function = str(dataset.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":  # PS3.3 C.11.2.1.3.1
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -60, 60)))
    if function == "LINEAR_EXACT":  # PS3.3 C.11.2.1.3.2
        return np.clip((values - centre) / width + 0.5, 0, 1)
    return through_window(values, centre, width)


def _first(value: object) -> float | None:
    """A window may have several values: the first is the one that viewers open with."""
    if isinstance(value, pydicom.multival.MultiValue):
        value = value[0] if value else None
    return None if value is None or value == "" else float(str(value))


def _high_byte(colour: np.ndarray) -> np.ndarray:
    return to_uint8(colour if colour.dtype == np.uint8 else (colour >> 8).astype(np.uint8))
