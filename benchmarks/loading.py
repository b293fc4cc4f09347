"""(d) Data loading: epochs of batches with the cache of decoded pictures and without it (every epoch decodes)."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.step import write_site
from benchmarks.table import Measurement


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    value = call()
    return time.perf_counter() - start, value


def _decoding_epoch(folder: Path, names: list[str], size: int, batch: int) -> None:
    from heterosync.data.readers import ImageReader, to_size

    reader = ImageReader(folder)
    for start in range(0, len(names), batch):
        pixels = np.stack([to_size(reader.read(name), size) for name in names[start : start + batch]])
        torch.from_numpy(pixels).float().div_(255)


def run(quick: bool = False) -> list[Measurement]:
    from heterosync.data.dataset import load_site

    size, side, count, batch = (32, 48, 16, 8) if quick else (224, 1024, 256, 64)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "site"
        folder.mkdir()
        write_site(folder, count, side, max(count // 4, 4))
        first, data = _timed(lambda: load_site(folder, size))
        again, data = _timed(lambda: load_site(folder, size))
        images = data.primary
        order = np.random.default_rng(0).permutation(len(images))

        def cached_epoch() -> None:
            for start in range(0, len(order), batch):
                images.batch(order[start : start + batch])

        cached_epoch()
        cached = min(_timed(cached_epoch)[0] for _ in range(3))
        decoded = min(_timed(lambda: _decoding_epoch(folder, images.ids, size, batch))[0] for _ in range(2))
    what = f"{count} JPEG of {side} px to {size} px"
    return [
        Measurement(
            "loading",
            f"an epoch, {what}",
            "ms per image",
            cached / count * 1e3,
            decoded / count * 1e3,
            decoded / cached,
        ),
        Measurement(
            "loading",
            "opening a site again, with its cache",
            "s",
            again,
            first,
            first / again,
            note="other: the first time",
        ),
    ]
