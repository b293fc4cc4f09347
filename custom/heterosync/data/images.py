"""Decoded pictures of one task, and the identity of a picture's content."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Images:
    """Pictures of one task at one size.

    `pixels` is uint8 (n, channels, height, width), often a read-only memory map; `labels` is int64 (n,) with
    0 negative and 1 positive; `ids` are paths relative to the site folder and never leave the site.
    """

    pixels: np.ndarray
    labels: np.ndarray
    ids: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """The pictures of `rows` as float32 (b, channels, height, width) in [0, 1]; no mean/std normalisation."""
        picked = self.pixels[np.asarray(rows, dtype=np.int64)]  # an index array copies: the map itself stays untouched
        return torch.from_numpy(np.asarray(picked)).to(torch.float32).div_(255.0)

    def subset(self, rows: Sequence[int] | np.ndarray) -> Images:
        """A copy in memory of `rows`, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        return Images(np.asarray(self.pixels[rows]), self.labels[rows], [self.ids[row] for row in rows])


def content_hash(image: np.ndarray) -> str:
    """SHA-256 of a decoded uint8 picture, (h, w) or (h, w, 3): its shape and its pixels.

    A colour picture with three equal channels counts as the grey picture that it shows, so the same picture has the
    same hash whether it was stored as PNG, as RGB PNG or in an .npz pack.
    """
    if image.ndim == 3 and (image == image[..., :1]).all():
        image = image[..., 0]
    digest = hashlib.sha256("x".join(map(str, image.shape)).encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()
