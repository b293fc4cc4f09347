"""Tensors in one plain file: no pickle, no copy kept in memory, overwritten in place.

Used where weights wait for a moment (contributions of a round, tensors handed to the trainer process). Such a file is
written over again and again instead of made anew: for 95 MB that takes 0.02 s instead of 0.4 s on ext4, where new pages
are what costs. It is not a format to keep: see modelfile.py for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heterosync.errors import HeteroSyncError
from heterosync.files import explained


def as_array(value: Any) -> np.ndarray:
    """The numpy view of a CPU tensor, numpy array or numpy scalar; a tensor elsewhere is copied to the CPU first."""
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


class TensorFile:
    """The tensors of one message at `path`; `layout` says where each lies: name -> (offset, type, shape)."""

    def __init__(self, path: Path, layout: Mapping[str, Any] | None = None):
        self.path = path
        self.layout: dict[str, tuple[int, str, tuple[int, ...]]] = {
            name: (int(offset), str(dtype), tuple(shape)) for name, (offset, dtype, shape) in (layout or {}).items()
        }

    def write(self, tensors: Mapping[str, Any]) -> TensorFile:
        """Replace the content. The file is not whole while this runs: whoever reads must wait for the layout."""
        self.layout = {}
        layout, offset = {}, 0
        with explained(self.path), self.path.open("r+b" if self.path.exists() else "wb") as file:
            for name, value in tensors.items():
                array = as_array(value)
                layout[name] = (offset, array.dtype.str, array.shape)
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
                offset += array.nbytes
            file.truncate(offset)
        self.layout = layout
        return self

    def part(self, name: str, begin: int = 0, count: int | None = None) -> np.ndarray:
        """`count` elements (default: all that remain) of tensor `name`, flat, from element `begin` on."""
        offset, dtype, shape = self.layout[name]
        kind = np.dtype(dtype)
        count = math.prod(shape) - begin if count is None else count
        values = np.fromfile(self.path, kind, count, offset=offset + begin * kind.itemsize)
        if len(values) != count:
            raise HeteroSyncError(f"{self.path} ends before tensor '{name}' does: it was cut off")
        return values

    def read(self) -> dict[str, torch.Tensor]:
        """All tensors, copied into memory."""
        return {name: torch.from_numpy(self.part(name).reshape(shape)) for name, (_, _, shape) in self.layout.items()}
