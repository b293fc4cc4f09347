"""What a frozen encoder makes of a site's pictures: computed once per picture, kept beside the decoded pictures."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from heterosync import pulse
from heterosync.data.images import Images
from heterosync.errors import UserError
from heterosync.files import write_stream
from heterosync.training.feed import Feed

log = logging.getLogger(__name__)
_BATCH = 32


class FrozenFeed(Feed):
    """Rows of one image set -> their features float32 (b, d) on `device`.

    encode: pictures (b, c, h, w) in [0, 1] on `device` to features (b, d). The features are kept in the folder `cache`
    (None: in memory alone), by the content of the pictures, in a file named after `encoder`, which must tell one
    encoder from another. They are as private as the pictures.
    """

    def __init__(
        self,
        images: Images,
        device: torch.device,
        encode: Callable[[Tensor], Tensor],
        encoder: str,
        cache: Path | None,
    ):
        super().__init__(images, torch.device("cpu"))
        self.device = device
        name = hashlib.sha256(encoder.encode()).hexdigest()[:16]
        file = cache / f"features-{name}.npz" if cache is not None else None
        keys = [hashlib.sha256(np.ascontiguousarray(picture).data).hexdigest() for picture in images.pixels]
        known = _read(file)
        wanted = {key: row for row, key in enumerate(keys) if key not in known}
        rows = np.array(sorted(wanted.values()), dtype=np.int64)
        for start in range(0, len(rows), _BATCH):
            pulse.beat()
            part = rows[start : start + _BATCH]
            with torch.no_grad():
                features = encode(images.batch(part).to(device)).float().cpu().numpy()
            known |= {keys[row]: feature for row, feature in zip(part.tolist(), features, strict=True)}
        found = np.stack([known[key] for key in keys]) if keys else np.empty((0, 0), np.float32)
        if len(rows) and file is not None:
            try:
                write_stream(file, lambda stream: np.savez(stream, keys=np.array(keys), features=found))
            except (OSError, UserError) as error:
                log.warning("features are computed anew at the next start: %s", error)
        self._features = torch.from_numpy(found).to(device)

    def batch(self, rows: np.ndarray) -> Tensor:
        return self._features[torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(self.device)]


def _read(file: Path | None) -> dict[str, np.ndarray]:
    """Features by the content of their picture; none where the file is missing or damaged."""
    if file is None or not file.is_file():
        return {}
    try:
        with np.load(file, allow_pickle=False) as kept:
            return dict(zip(kept["keys"].tolist(), kept["features"], strict=True))
    except Exception as error:  # a cut archive raises anything
        log.warning("%s is damaged (%s): its features are computed anew", file.name, type(error).__name__)
        return {}
