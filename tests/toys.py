"""Tiny sites and settings that every test may use."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from heterosync.data.anchor import write_anchor

#: Settings of the smoke profile: a ResNet of width 8 on 32-pixel images, two rounds of one epoch, float32.
SMOKE: dict = {
    "image_size": 32,
    "backbone": "resnet_tiny",
    "weights": "none",
    "rounds": 2,
    "local_epochs": 1,
    "batch_size": 16,
    "augment": False,
    "precision": "float32",
}

#: Method settings that go with SMOKE, by method: for those whose own defaults are sized for 224 pixels or a large GPU.
SMALL: dict[str, dict] = {
    "clip": {"clip_model": "stand-in"},
    "fedppkt": {
        **{"teacher_epochs": 6, "nz": 8, "ngf": 4, "synthesis_batch": 16, "pool": 64, "kd_steps": 6},
        **{"warm_up": 0, "server_gen_epochs": 1, "server_gen_steps": 2},
    },
    "fedtp": {"dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "mlp": 64, "embed": 8, "hyper_hidden": 16},
    "fedktl": {"fit_steps": 5, "server_epochs": 20},
}


def toy_images(labels: np.ndarray, seed: int, size: int = 32, signal: int = 120) -> np.ndarray:
    """uint8 (n, size, size) noise; images of label 1 carry a bright square of `signal` grey levels in one corner."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 100, (len(labels), size, size), dtype=np.uint8)
    images[labels == 1, : size // 2, : size // 2] += np.uint8(signal)
    return images


def toy_site(
    folder: Path,
    counts: tuple[int, int] = (20, 20),
    seed: int = 0,
    size: int = 32,
    signal: int = 120,
    anchor: bool = True,
    anchor_seed: int = 99,
    anchor_count: int = 10,
) -> Path:
    """Write a site folder with `counts` (negative, positive) images and an anchor pack of 2 x `anchor_count`."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.repeat([0, 1], counts)
    np.savez(folder / "images.npz", images=toy_images(labels, seed, size, signal))
    rows = [f"images.npz#{i},{('normal', 'abnormal')[label]}" for i, label in enumerate(labels)]
    (folder / "manifest.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    (folder / "site.yaml").write_text("task: toy\nlabels: [normal, abnormal]\ndevice: cpu\n")
    if anchor:
        anchor_labels = np.repeat([0, 1], anchor_count)
        write_anchor(
            folder / "anchor",
            toy_images(anchor_labels, anchor_seed, size)[:, ::-1].copy(),
            anchor_labels,
            name="toy anchor",
            negative="off",
            positive="on",
        )
    return folder


def toy_alliance(folder: Path, sites: int = 2, counts: tuple[int, int] = (20, 20), **options) -> dict[str, Path]:
    """`sites` folders named site-a, site-b, … below `folder`, each with its own images and the same anchor pack."""
    names = [f"site-{chr(ord('a') + i)}" for i in range(sites)]
    return {name: toy_site(folder / name, counts, seed=i, **options) for i, name in enumerate(names)}
