"""From the numbers that a file stores to the uint8 values of a picture."""

from __future__ import annotations

import numpy as np

from heterosync.errors import UserError

Window = tuple[float, float]  # centre and width, in the unit of the stored values (Hounsfield units for CT)


def to_uint8(values: np.ndarray, window: Window | None = None) -> np.ndarray:
    """Grey (h, w) or (h, w, 1) or colour (h, w, 3) numbers as uint8 (h, w) or (h, w, 3).

    uint8 stays as it is; other types are scaled through `window` or from minimum to maximum (a constant picture
    becomes 0). Raises `UserError` for other shapes, NaN and infinite values.
    """
    values = np.asarray(values)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if not (values.ndim == 2 or (values.ndim == 3 and values.shape[2] == 3)) or 0 in values.shape:
        raise UserError(f"the picture has shape {values.shape}, not (h, w) or (h, w, 3): export one picture per row")
    if values.dtype == np.uint8:
        return values
    if values.dtype == bool:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind not in "iuf":
        raise UserError(f"the picture has values of type {values.dtype}, not numbers: save it as uint8 or float32")
    values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise UserError("the picture has NaN or infinite values: export it again or delete the row")
    return unit_to_uint8(through_window(values, *window) if window else min_max(values))


def min_max(values: np.ndarray, within: np.ndarray | None = None) -> np.ndarray:
    """Values in [0, 1], from minimum to maximum (of the pixels `within`); a constant picture becomes 0."""
    inside = values if within is None else values[within]
    low, high = (inside.min(), inside.max()) if inside.size else (0, 0)
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)


def through_window(values: np.ndarray, centre: float, width: float) -> np.ndarray:
    """Values in [0, 1] by the linear VOI function of DICOM PS3.3 C.11.2.1.2.1."""
    return np.clip((values - (centre - 0.5)) / max(width - 1, 1e-9) + 0.5, 0, 1)


def unit_to_uint8(unit: np.ndarray) -> np.ndarray:
    return np.rint(unit * 255).astype(np.uint8)
