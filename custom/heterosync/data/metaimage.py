"""MetaImage (.mhd with .raw or .zraw, .mha), the format of PROMISE12. https://itk.org/Wiki/MetaIO/Documentation"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heterosync.data.volume_geometry import LPS_TO_RAS, Geometry
from heterosync.errors import UserError

LONGEST = 1 << 16  # bytes; a header is a few lines of text
TYPES = {
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}


@dataclass(frozen=True)
class MetaHeader:
    geometry: Geometry
    type: np.dtype
    data: Path
    start: int  # byte at which the values begin; -1: the values are the last bytes of the file
    compressed: bool


def read_header(path: Path) -> MetaHeader:
    """The header of an .mhd or .mha file. Raises `UserError` when a needed key is missing or of no use here."""
    tags, length = _tags(path)
    if "DimSize" not in tags or "ElementDataFile" not in tags:
        raise UserError("no MetaImage header (DimSize or ElementDataFile is missing): copy it again")
    shape = tuple(int(number) for number in tags["DimSize"].split())
    if len(shape) != 3:
        raise UserError(f"a {len(shape)}-D image: give one 3-D volume")
    if tags.get("ElementNumberOfChannels", "1") != "1":
        raise UserError("has several channels: export one")
    if tags.get("ElementType") not in TYPES:
        raise UserError(f"has values of type {tags.get('ElementType')}: known are {', '.join(TYPES)}")
    big = _first(tags, ("BinaryDataByteOrderMSB", "ElementByteOrderMSB"), "False") == "True"
    name = tags["ElementDataFile"]
    start = int(tags.get("HeaderSize", 0))
    data = path if name == "LOCAL" else path.parent / name
    if Path(name).name != name or not data.is_file():
        raise UserError(f"its values are in '{name}', which does not lie beside it: copy both files together")
    return MetaHeader(
        geometry=Geometry(shape, _affine(tags)),
        type=np.dtype((">" if big else "<") + TYPES[tags["ElementType"]]),
        data=data,
        start=length if name == "LOCAL" else start,
        compressed=tags.get("CompressedData", "False") == "True",
    )


def read_values(header: MetaHeader) -> np.ndarray:
    """The values (x, y, z). Raises `UserError` when the file holds fewer or more than its header tells."""
    size = int(np.prod(header.geometry.shape)) * header.type.itemsize
    with open(header.data, "rb") as file:
        file.seek(*((-size, 2) if header.start < 0 else (header.start, 0)))
        data = file.read()
    if header.compressed:
        data = zlib.decompressobj().decompress(data, size + 1)  # no more than the header promises
    if len(data) != size:
        raise UserError(f"holds {len(data)} bytes of values, its header tells of {size}: copy both files again")
    values = np.frombuffer(data, header.type).reshape(header.geometry.shape, order="F")
    return values.astype(header.type.newbyteorder("="))


def _tags(path: Path) -> tuple[dict[str, str], int]:
    """The lines 'key = value' up to ElementDataFile, which is the last, and the bytes that they take."""
    tags: dict[str, str] = {}
    with open(path, "rb") as file:
        for line in iter(lambda: file.readline(LONGEST), b""):
            key, equals, value = line.decode("latin-1").partition("=")
            if not equals or file.tell() > LONGEST:
                break
            tags[key.strip()] = value.strip()
            if key.strip() == "ElementDataFile":
                break
        return tags, file.tell()


def _affine(tags: dict[str, str]) -> np.ndarray:
    """Each three numbers of TransformMatrix are the direction of one array axis; Offset is voxel (0, 0, 0)."""
    axes = _numbers(tags, ("TransformMatrix", "Rotation", "Orientation"), 9, "1 0 0 0 1 0 0 0 1").reshape(3, 3).T
    affine = np.eye(4)
    affine[:3, :3] = axes @ np.diag(_numbers(tags, ("ElementSpacing", "ElementSize"), 3, "1 1 1"))
    affine[:3, 3] = _numbers(tags, ("Offset", "Position", "Origin"), 3, "0 0 0")
    return LPS_TO_RAS @ affine


def _numbers(tags: dict[str, str], names: tuple[str, ...], count: int, default: str) -> np.ndarray:
    numbers = [float(part) for part in _first(tags, names, default).split()]
    if len(numbers) != count:
        raise UserError(f"{names[0]} has {len(numbers)} numbers instead of {count}: export it again")
    return np.array(numbers)


def _first(tags: dict[str, str], names: tuple[str, ...], default: str) -> str:
    return next((tags[name] for name in names if name in tags), default)
