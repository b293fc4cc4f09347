"""One picture from a file: PNG, JPEG, BMP, TIFF, DICOM, NIfTI, .npy or an entry of an .npz pack, always as uint8."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
from PIL import Image

from heterosync.data.grey import Window, to_uint8
from heterosync.data.packs import Pack, split_entry
from heterosync.errors import UserError

PILLOW_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


class ImageReader:
    """Reads the pictures of one folder; every pack is opened once. Usable by several threads."""

    def __init__(self, folder: Path | str, window: Window | None = None):
        self._folder = Path(folder)
        self._window = window
        self._packs: dict[str, Pack] = {}
        self._lock = threading.Lock()

    def read(self, name: str) -> np.ndarray:
        """The picture `name` ('images/a.png' or 'images.npz#3') as uint8 (h, w) or (h, w, 3).

        Raises `UserError` that starts with `name` and says what is wrong with the file.
        """
        try:
            file, entry = split_entry(name)
            path = self._folder / file
            if not path.is_file():
                raise UserError("the file does not exist: copy it there or delete the row")
            if path.stat().st_size == 0:
                raise UserError("the file is empty (0 bytes): copy it again")
            if entry is None:
                return _decode(path, self._window)
            with self._lock:
                if file not in self._packs:
                    self._packs[file] = Pack(path)
                stored = self._packs[file][entry]
            return to_uint8(stored, self._window)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        except PermissionError as error:
            raise UserError(f"{name}: no permission to read the file: change its owner or mode") from error
        except MemoryError:
            raise
        except Exception as error:  # damaged files make decoders raise anything: SyntaxError, struct.error, ...
            cause = " ".join(str(error).split()).replace(str(self._folder), ".")[:160] or type(error).__name__
            raise UserError(f"{name}: the file is truncated or damaged ({cause}): copy or export it again") from error


def read_image(path: Path | str, window: Window | None = None) -> np.ndarray:
    """One picture as uint8 (h, w) or (h, w, 3); `path` may name an entry of a pack: 'folder/pack.npz#3'.

    Values that are not uint8 are scaled to 0..255: through `window` (centre, width) when given, through the window
    that a DICOM file carries, otherwise from the picture's own minimum to its maximum.
    """
    path = Path(path)
    return ImageReader(path.parent, window).read(path.name)


def _decode(path: Path, window: Window | None) -> np.ndarray:
    name = path.name.lower()
    if name.endswith(PILLOW_SUFFIXES):
        return to_uint8(_read_pillow(path), window)
    if name.endswith((".nii", ".nii.gz")):
        return to_uint8(_read_nifti(path), window)
    if name.endswith(".npy"):
        return to_uint8(np.load(path, allow_pickle=False), window)
    if name.endswith(".npz"):
        raise UserError("this is a pack: name one of its images by its number, as pack.npz#0")
    if name.endswith((".dcm", ".dicom", ".ima")) or _has_dicom_mark(path):  # PACS exports often have no suffix at all
        from heterosync.data.dicom import read_dicom

        return read_dicom(path, window)
    raise UserError("unknown image format: use PNG, JPEG, DICOM, NIfTI (2-D), .npy or an .npz pack")


def _has_dicom_mark(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def _read_pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise UserError("the file holds several pictures: export the one to be classified as a file of its own")
        if image.mode in ("1", "LA", "La"):
            return np.asarray(image.convert("L"))
        if image.mode == "L" or image.mode == "F" or image.mode.startswith("I"):  # I;16 and I: 16-bit grey
            return np.array(image)
        return np.asarray(image.convert("RGB"))


def _read_nifti(path: Path) -> np.ndarray:
    """The slice as radiologists see it and as DICOM stores it: axial with row 0 anterior and column 0 the patient's
    right; coronal with row 0 superior and column 0 right; sagittal with row 0 superior and column 0 anterior."""
    import nibabel

    image = nibabel.load(path)
    long = [length for length in image.shape if length != 1]
    if len(long) != 2 or any(length != 1 for length in image.shape[3:]):
        raise UserError(f"a NIfTI volume of shape {image.shape}, not a 2-D slice: export the slice to be classified")
    axes = nibabel.io_orientation(image.affine)
    if not np.isfinite(axes).all():
        raise UserError("the NIfTI affine does not orient all three axes: export the file again")
    values = np.asarray(image.dataobj).reshape((*image.shape, 1)[:3])
    # as nibabel.as_closest_canonical (which refuses 2-D arrays): the axes point right, anterior, superior
    canonical = nibabel.apply_orientation(values, axes)
    return np.flip(canonical).squeeze().T


def to_size(image: np.ndarray, size: int, channels: int = 3, fit: str = "stretch") -> np.ndarray:
    """A uint8 picture as uint8 (channels, size, size): bicubic; aspect ratio not kept (the paper and its code), or with
    `fit` "crop" the shorter side to `size` and the middle of the longer one (Radford et al., ICML 2021, official code).
    """
    picture = Image.fromarray(image)
    if channels == 1:
        picture = picture.convert("L")
    if picture.size != (size, size):
        width, height = picture.size
        short = min(picture.size) if fit == "crop" else None
        wanted = (size * width // short, size * height // short) if short else (size, size)
        picture = picture.resize(wanted, Image.Resampling.BICUBIC)
        left, top = (round((side - size) / 2) for side in wanted)
        picture = picture.crop((left, top, left + size, top + size))
    pixels = np.asarray(picture)
    if pixels.ndim == 2:
        return np.repeat(pixels[None], channels, axis=0)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))
