"""Site folders and image files for the tests of `heterosync.data`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

CONFIG = "task: toy\nlabels: [normal, abnormal]\n"


def picture(seed: int, shape: tuple[int, ...] = (12, 10), dtype: type = np.uint8) -> np.ndarray:
    """Seeded noise over the whole range of an integer type."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Independent of the code under test: straight line from low..high to 0..255, cut off outside."""
    part = (values.astype(float) - float(low)) / (float(high) - float(low))
    return np.round(255 * np.minimum(1, np.maximum(0, part))).astype(np.uint8)


def save_png(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_manifest(folder: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("image", "label")) -> None:
    (folder / "manifest.csv").write_text("".join(",".join(row) + "\n" for row in [header, *rows]))


def png_site(folder: Path, counts: tuple[int, int] = (6, 6), size: int = 12, seed: int = 0) -> list[list[str]]:
    """A valid site folder of PNG files without an anchor pack; returns the manifest's rows [image, label]."""
    rows = []
    for number, label in enumerate(np.repeat([0, 1], counts)):
        name = f"images/{number:02d}.png"
        save_png(folder / name, picture(1000 * seed + number, (size, size)))
        rows.append([name, ("normal", "abnormal")[label]])
    write_manifest(folder, rows)
    (folder / "site.yaml").write_text(CONFIG)
    return rows


def write_dicom(path: Path, pixels: np.ndarray, meaning: str = "MONOCHROME2", **tags: object) -> Path:
    """A little-endian uncompressed DICOM file of `pixels`, (h, w), (h, w, 3) or (frames, h, w); `tags` by keyword."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    colour = pixels.ndim == 3 and pixels.shape[2] == 3
    dataset.Rows, dataset.Columns = pixels.shape[:2] if colour or pixels.ndim == 2 else pixels.shape[1:]
    dataset.SamplesPerPixel = 3 if colour else 1
    if colour:
        dataset.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.PhotometricInterpretation = meaning
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    for name, value in tags.items():
        setattr(dataset, name, value)
    dataset.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path
