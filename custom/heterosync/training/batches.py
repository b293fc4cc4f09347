"""Which images a local epoch sees, in which order and in which pairs: as the official code, for every method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from heterosync.training.seeds import stream
from heterosync.training.settings import TrainingSettings


@dataclass(frozen=True)
class Batch:
    """What a loss sees, float32: images (b, c, h, w) with labels (b,) of 0 and 1, and an anchor half if in use; or
    volumes (b, 1, x, y, z) with masks of the same shape."""

    images: Tensor
    labels: Tensor
    anchor_images: Tensor | None = None
    anchor_labels: Tensor | None = None


@dataclass(frozen=True)
class EpochPlan:
    """Item i shows row `primary[i]` of the training rows beside row `anchor[i]` of the anchor set, if there is one."""

    primary: np.ndarray
    anchor: np.ndarray | None

    def __len__(self) -> int:
        return len(self.primary)


def replacement_probability(labels: np.ndarray) -> float:
    """Chance (0.5 - p_min) / p_max that a drawn majority item gives way to a minority one; 0 if a class is absent.

    It makes the expected class ratio 1:1: p_max (1 - q) = 1/2.
    """
    share = float(np.mean(labels)) if len(labels) else 0.0
    low, high = min(share, 1 - share), max(share, 1 - share)
    return 0.0 if low == 0 else (0.5 - low) / high


def plan_epoch(
    labels: np.ndarray, n_anchor: int, settings: TrainingSettings, site: str, round_: int, epoch: int
) -> EpochPlan:
    """Plan one epoch for training labels (n,) of 0 and 1; `n_anchor` is 0 for methods without anchor task.

    N = max(n, n_anchor, match_steps) items; item i shows image i, or a random one beyond the end, of either set. With
    balancing a majority image is replaced, with `replacement_probability`, by a uniformly drawn minority one. The
    anchor set is never balanced. At last the items are shuffled.
    """

    def rng(purpose: str) -> np.random.Generator:  # streams apart: the anchor set never shifts the primary draws
        return stream(settings.seed, site, round_, epoch, purpose)

    total = max(len(labels), n_anchor, settings.match_steps)
    primary = _cycle(len(labels), total, rng("primary"))
    if settings.balanced_sampler:
        draw = rng("balance")
        minority = int(np.mean(labels) < 0.5)
        rows = np.flatnonzero(labels == minority)
        replaced = (labels[primary] != minority) & (draw.random(total) < replacement_probability(labels))
        if len(rows):
            primary = np.where(replaced, rows[draw.integers(0, len(rows), total)], primary)
    anchor = _cycle(n_anchor, total, rng("anchor")) if n_anchor else None
    order = rng("order").permutation(total)
    return EpochPlan(primary[order], None if anchor is None else anchor[order])


def _cycle(count: int, total: int, rng: np.random.Generator) -> np.ndarray:
    return np.concatenate([np.arange(count), rng.integers(0, count, total - count)])


def batch_bounds(items: int, size: int) -> list[tuple[int, int]]:
    """Cut `items` into batches of `size`; none is dropped.

    A last batch of one item joins the batch before it, since BatchNorm needs two.
    """
    edges = list(range(0, items, size))
    if len(edges) > 1 and items - edges[-1] == 1:
        edges.pop()
    return list(zip(edges, [*edges[1:], items], strict=True))
