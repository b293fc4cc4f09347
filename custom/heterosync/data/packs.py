"""Pictures inside an .npz pack, read one at a time: a pack may be larger than the memory."""

from __future__ import annotations

import re
import struct
import zipfile
from pathlib import Path

import numpy as np

from heterosync.errors import UserError

ARRAY = "images"  # the array of a pack that holds the pictures, (n, h, w) or (n, h, w, 3)
RECENT_BYTES = 64 << 20
_ENTRY = re.compile(r"(.+\.npz)#(\d+)", re.IGNORECASE)


def split_entry(name: str) -> tuple[str, int | None]:
    """('pack.npz', 3) for 'pack.npz#3'; (name, None) for a file of its own."""
    match = _ENTRY.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


class Pack:
    """One open pack; `pack[3]` is its fourth picture as stored.

    An uncompressed pack is memory-mapped. A compressed one is decompressed as a stream: reading in about ascending
    order costs one pass, a step back further than `_recent` reaches starts the pass again. For one thread at a time.
    """

    def __init__(self, path: Path):
        archive = zipfile.ZipFile(path)
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        if ARRAY not in names:
            held = ", ".join(names) or "nothing"
            raise UserError(f"the pack has no array '{ARRAY}' (it holds {held}): rename the array")
        info = archive.getinfo(f"{ARRAY}.npy")
        self._stream = archive.open(info)
        version = np.lib.format.read_magic(self._stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, fortran, self._dtype = read_header(self._stream)
        if fortran or self._dtype.hasobject:
            raise UserError("the pack's array is not C-ordered numbers: save it again with numpy.savez")
        if len(self.shape) not in (3, 4):
            raise UserError(f"the pack's array has shape {self.shape}, expected (n, h, w) or (n, h, w, 3)")
        self._start = self._stream.tell()
        self._frame_bytes = int(np.prod(self.shape[1:])) * self._dtype.itemsize
        self._next = 0  # the frame at which the stream stands
        self._recent: dict[int, bytes] = {}  # the last frames that the stream passed
        self._map: np.ndarray | None = None
        if info.compress_type == zipfile.ZIP_STORED and self.shape[0]:
            with open(path, "rb") as file:
                file.seek(info.header_offset + 26)  # the local header ends with two lengths, then name and extra field
                offset = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            self._map = np.memmap(path, self._dtype, "r", offset + self._start, self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> np.ndarray:
        if index >= len(self):
            raise UserError(f"the pack holds {len(self)} images, numbered from 0: correct the number after '#'")
        if self._map is not None:
            return np.array(self._map[index])
        if index < self._next and index not in self._recent:
            self._stream.seek(self._start)
            self._next, self._recent = 0, {}
        while self._next <= index:
            data = self._stream.read(self._frame_bytes)
            if len(data) < self._frame_bytes:
                raise EOFError("the array ends early")
            self._recent[self._next] = data
            self._next += 1
            if len(self._recent) > max(1, min(64, RECENT_BYTES // max(1, self._frame_bytes))):
                del self._recent[next(iter(self._recent))]
        return np.frombuffer(self._recent[index], self._dtype).reshape(self.shape[1:])
