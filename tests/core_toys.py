"""Sites in memory for tests of models, training and methods."""

from __future__ import annotations

import numpy as np

from heterosync.data.dataset import SiteData
from heterosync.data.images import Images
from heterosync.data.site import SiteConfig
from heterosync.methods import make_method
from heterosync.training import LocalTrainer, TrainingSettings
from toys import SMOKE, toy_images


def toy_set(counts: tuple[int, int], seed: int, size: int = 32, signal: int = 120) -> Images:
    """Separable images in mixed order of labels."""
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 1], counts)).astype(np.int64)
    pixels = np.repeat(toy_images(labels, seed, size, signal)[:, None], 3, 1)
    return Images(pixels, labels, [f"{seed}-{i}.png" for i in range(len(labels))])


def toy_data(
    counts: tuple[int, int] = (20, 20), seed: int = 0, anchor: tuple[int, int] | None = (10, 10), **options
) -> SiteData:
    """A site whose images go in turn to train (3 of 5), validation and test."""
    primary = toy_set(counts, seed, **options)
    rows = np.arange(len(primary))
    splits = {"train": rows[rows % 5 < 3], "validation": rows[rows % 5 == 3], "test": rows[rows % 5 == 4]}
    second = toy_set(anchor, 99, **options) if anchor else None
    config = SiteConfig(task="toy", labels=("normal", "abnormal"))
    return SiteData(("normal", "abnormal"), primary, splits, second, "toy" if anchor else None, config)


def settings(**changes) -> TrainingSettings:
    return TrainingSettings.from_dict({**SMOKE, **changes})


def trainer(
    name: str = "hsl",
    method_settings: dict | None = None,
    data: SiteData | None = None,
    site: str = "site-a",
    **changes,
) -> LocalTrainer:
    """A trainer of the smoke profile; `changes` are training settings, apart from work and progress."""
    extra = {key: changes.pop(key) for key in ("work", "progress", "precision_used") if key in changes}
    method = make_method(name, method_settings, settings(**changes))
    precision = extra.pop("precision_used", "float32")
    return LocalTrainer(method, data if data is not None else toy_data(), site, precision=precision, **extra)
