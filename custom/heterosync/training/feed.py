"""Batches of decoded images on the training device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from heterosync.data.images import Images


def channels_last(images: Tensor) -> Tensor:
    """Pictures (b, c, h, w) in the memory layout that networks are quickest on; features (b, d) as they are."""
    return images.contiguous(memory_format=torch.channels_last) if images.ndim == 4 else images


class Feed:
    """Rows of one image set -> float32 (b, c, h, w) in [0, 1] on `device`.

    On a GPU the uint8 pixels stay there if they fill less than a quarter of its free memory; else each batch travels.
    """

    def __init__(self, images: Images, device: torch.device):
        self.images = images
        self.device = device
        self._resident: Tensor | None = None
        if device.type == "cuda" and images.pixels.nbytes < torch.cuda.mem_get_info(device)[0] // 4:
            self._resident = torch.from_numpy(np.array(images.pixels)).to(device)

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: np.ndarray) -> Tensor:
        if self.device.type != "cuda":
            return self.images.batch(rows).to(self.device)
        if self._resident is not None:
            pixels = self._resident[torch.from_numpy(np.asarray(rows)).to(self.device)]
        else:
            picked = torch.from_numpy(np.asarray(self.images.pixels[np.asarray(rows)]))
            pixels = picked.pin_memory().to(self.device, non_blocking=True)
        return pixels.float().div_(255)

    def labels(self, rows: np.ndarray) -> Tensor:
        """Labels of these rows, float32 (b,) of 0 and 1."""
        return torch.from_numpy(self.images.labels[np.asarray(rows)].astype(np.float32)).to(self.device)
