"""(a) Training step: a local epoch of this project against the published step, at 64 and 224 pixels.

Both sides train the same network on the same files (JPEG radiograph-sized pictures and PNG anchors). The published
side decodes every item of every epoch; ours reads the cache that the first epoch of a run fills, whose making is
measured apart (part "loading"). Compared is the time per item of a training epoch without validation; the best of
`repeats` epochs counts.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import published
from benchmarks.table import Measurement

LABELS = ("normal", "abnormal")


def write_files(folder: Path, count: int, side: int, seed: int, suffix: str = ".jpg") -> list[tuple[Path, int]]:
    """`count` grey pictures of `side` x `side` pixels, smooth with noise so that they compress like radiographs."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    files = []
    for i in range(count):
        smooth = Image.fromarray(rng.integers(0, 200, (8, 8), dtype=np.uint8)).resize(
            (side, side), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(smooth, dtype=np.int16) + rng.integers(0, 20, (side, side))
        path = folder / f"{i:04d}{suffix}"
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path)
        files.append((path, i % 2))
    return files


def write_site(
    folder: Path, count: int, side: int, anchors: int
) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]]]:
    """A site folder with the files of both tasks; returns (primary files, anchor files) with labels."""
    from heterosync.data.anchor import write_anchor

    primary = write_files(folder / "images", count, side, seed=1)
    anchor = write_files(folder.parent / "anchor_files", anchors, side, seed=2, suffix=".png")
    rows = [f"images/{path.name},{LABELS[label]}" for path, label in primary]
    (folder / "manifest.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    (folder / "site.yaml").write_text(f"task: benchmark\nlabels: [{', '.join(LABELS)}]\n")
    pixels = np.stack([np.asarray(Image.open(path)) for path, _ in anchor])
    write_anchor(folder / "anchor", pixels, np.array([label for _, label in anchor]), "benchmark anchor", "off", "on")
    return primary, anchor


def _published(
    primary: list[tuple[Path, int]], anchor: list[tuple[Path, int]], size: int, batch: int, device: str, repeats: int
) -> float:
    torch.manual_seed(0)
    model = published.PublishedMMoE().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    files = published.PairedFiles(primary, anchor, size)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        items = published.epoch(model, optimizer, files, batch, device)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / items)
    return best


class _Counted:
    """Batches as they come, and how many images they held."""

    def __init__(self, batches: Iterable):
        self._batches, self.items = batches, 0

    def __iter__(self) -> Iterator:
        for batch in self._batches:
            self.items += len(batch.images)
            yield batch


def _ours(folder: Path, size: int, batch: int, device: str, repeats: int) -> tuple[float, str]:
    from heterosync.data.dataset import load_site
    from heterosync.methods import make_method
    from heterosync.training.precision import choose_precision
    from heterosync.training.settings import TrainingSettings
    from heterosync.training.steps import Steps, make_optimizer

    settings = TrainingSettings(image_size=size, batch_size=batch, weights="none")
    method = make_method("hsl", None, settings)
    data = load_site(folder, size)
    assert data.anchor is not None
    precision, _ = choose_precision(method, device)
    place = torch.device(device)
    model = method.build_model().to(place, memory_format=torch.channels_last)
    examples = method.task.open(method, data, "benchmark", place, precision)
    steps = Steps(method, model, "benchmark", place, precision)
    optimizer = make_optimizer(model, settings)
    best = float("inf")
    for epoch in range(repeats):
        start = time.perf_counter()
        batches = _Counted(examples.batches(0, epoch))
        steps.run(batches, optimizer, 0, epoch)
        best = min(best, (time.perf_counter() - start) / batches.items)
    return best, precision


def run(quick: bool = False) -> list[Measurement]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # (pixels, stored side, images, batch, epochs): enough items for a steady figure, few enough for two processors
    cases = [(32, 48, 12, 6, 1)] if quick else [(64, 512, 128, 32, 3), (224, 512, 64, 32, 2)]
    if device == "cuda":
        cases = [(64, 512, 1024, 64, 3), (224, 512, 1024, 64, 3)]
    goal = ">= 6 on a datacentre GPU" if device == "cuda" else ">= 4 on a CPU with AMX"
    found = []
    for size, side, count, batch, repeats in cases:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "site"
            folder.mkdir()
            primary, anchor = write_site(folder, count, side, count)
            other = _published(primary, anchor, size, batch, device, repeats)
            ours, precision = _ours(folder, size, batch, device, repeats)
        note = f"{device}, {precision}, batch {batch}"
        found.append(
            Measurement(
                "step",
                f"HSL, {size} px",
                "ms per item",
                ours * 1e3,
                other * 1e3,
                other / ours,
                goal if size == 224 else "",
                note,
            )
        )
    return found
