"""One pass over all pictures of a task: read, hash, resize."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from heterosync import pulse
from heterosync.data.grey import Window
from heterosync.data.images import content_hash
from heterosync.data.packs import split_entry
from heterosync.data.readers import ImageReader, to_size
from heterosync.errors import UserError

CHUNK = 256  # pictures in flight at once


@dataclass
class Decoded:
    """Pictures in row order. `pixels` is uint8 (n, channels, size, size), or None when no size was asked for or a row
    failed; `content` holds `content_hash` of each picture before resizing; `errors` what is wrong, by row."""

    pixels: np.ndarray | None
    content: list[str | None]
    errors: dict[int, str] = field(default_factory=dict)


class Decoding:
    """One pass over all pictures: read, hash, resize, in an order that reads every pack front to back."""

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        size: int | None,
        channels: int,
        window: Window | None,
        threads: int | None,
        fit: str = "stretch",
    ):
        self.names, self.size, self.channels, self.fit = names, size, channels, fit
        self.threads = threads or min(8, os.cpu_count() or 1)
        self.reader = ImageReader(folder, window)
        self.known: dict[int, tuple[np.ndarray, str]] = {}  # rows that need no decoding: pixels and content
        self.result = Decoded(None, [None] * len(names))

    def in_memory(self) -> Decoded:
        shape = (len(self.names), self.channels, self.size or 0, self.size or 0)
        pixels = np.zeros(shape, np.uint8)
        for row, picture in self.pictures():
            pixels[row] = picture
        if self.size is not None and not self.result.errors:
            self.result.pixels = pixels
        return self.result

    def pictures(self) -> Iterator[tuple[int, np.ndarray]]:
        """(row, resized picture) in any order; fills `result.content` and `result.errors`."""
        entries = [split_entry(name) for name in self.names]
        order = [row for row in range(len(self.names)) if row not in self.known]
        order.sort(key=lambda row: (entries[row][0], entries[row][1] or 0))
        for row, (picture, content) in self.known.items():
            self.result.content[row] = content
            yield row, picture
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(order), CHUNK):
                for row, outcome in pool.map(self._one, *self._read_packs(order[start : start + CHUNK])):
                    if isinstance(outcome, str):
                        self.result.errors[row] = outcome
                        continue
                    picture, self.result.content[row] = outcome
                    if picture is not None:
                        yield row, picture

    def _read_packs(self, rows: list[int]) -> tuple[list[int], list[Any]]:
        """Entries of packs are read here, in order; files of their own are left to the threads."""
        return rows, [self._read(row) if split_entry(self.names[row])[1] is not None else None for row in rows]

    def _read(self, row: int) -> np.ndarray | str:
        try:
            return self.reader.read(self.names[row])
        except UserError as error:
            return str(error)

    def _one(self, row: int, image: np.ndarray | str | None) -> tuple[int, str | tuple[np.ndarray | None, str]]:
        pulse.beat()
        image = self._read(row) if image is None else image
        if isinstance(image, str):
            return row, image
        picture = None if self.size is None else to_size(image, self.size, self.channels, self.fit)
        return row, (picture, content_hash(image))
