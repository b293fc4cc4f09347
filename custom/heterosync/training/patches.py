"""Random patches of a site's volumes, around organ and background in a given ratio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Draws of a background voxel before any voxel is taken: an organ that fills its image leaves none.
TRIES = 64


@dataclass(frozen=True)
class Case:
    """A volume with its mask as tensors: image float32 (1, x, y, z), mask bool (x, y, z); of its voxels, the spacing in
    mm and the volume in ml."""

    id: str
    image: Tensor
    mask: Tensor
    spacing: tuple[float, ...]
    millilitres: float


class Patches:
    """Draws patches of the size `patch` from `cases`; with chance `foreground` around a voxel of the organ."""

    def __init__(self, cases: Sequence[Any], patch: tuple[int, int, int], foreground: float):
        self._cases, self._patch, self._foreground = cases, patch, foreground
        self._organs: dict[int, np.ndarray] = {}  # row -> flat indices of the organ's voxels

    def case(self, row: int) -> Case:
        """The whole volume of a row."""
        from heterosync.data.volume_geometry import voxel_millilitres

        volume = self._cases[row]
        image = torch.from_numpy(np.array(volume.image, dtype=np.float32))
        mask, affine = torch.from_numpy(np.asarray(volume.mask[0]) > 0), np.asarray(volume.affine)
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(0)).tolist()
        return Case(volume.id, image, mask, tuple(spacing), voxel_millilitres(affine))

    def draw(self, row: int, rng: np.random.Generator, margin: Sequence[int] = (0, 0, 0)) -> tuple[Tensor, Tensor]:
        """Image and mask, float32 (1, *patch). A patch keeps within the volume; where that is smaller, the image is
        padded with its mean, zero, and the mask with background, evenly on both sides.

        margin: voxels that are seen beyond the patch on both sides, padded likewise."""
        volume = self._cases[row]
        whole, organ = np.asarray(volume.image), np.asarray(volume.mask)
        inside, padding = [slice(None)], [(0, 0)]
        centre = self._centre(row, organ[0], rng)
        for middle, side, length, beyond in zip(centre, self._patch, organ.shape[1:], margin, strict=True):
            lacking = max(0, side - length)
            first = int(np.clip(middle - side // 2, 0, max(0, length - side))) - lacking // 2
            start, stop = first - beyond, first + side + beyond
            inside.append(slice(max(0, start), min(length, stop)))
            padding.append((max(0, -start), max(0, stop - length)))
        image, mask = (np.array(part[tuple(inside)], np.float32) for part in (whole, organ))
        return torch.from_numpy(np.pad(image, padding)), torch.from_numpy(np.pad(mask, padding))

    def _centre(self, row: int, mask: np.ndarray, rng: np.random.Generator) -> tuple[int, ...]:
        if row not in self._organs:
            self._organs[row] = np.flatnonzero(mask)
        organ = self._organs[row]
        if rng.random() < self._foreground and len(organ):
            return tuple(map(int, np.unravel_index(organ[rng.integers(len(organ))], mask.shape)))
        for _ in range(TRIES):
            centre = tuple(int(rng.integers(length)) for length in mask.shape)
            if not mask[centre]:
                break
        return centre
