"""Scoring images: every image exactly once, in order, without balancing or augmentation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from heterosync import pulse
from heterosync.data.images import Images
from heterosync.errors import UserError
from heterosync.training.feed import Feed, channels_last
from heterosync.training.learner import Learner
from heterosync.training.precision import autocast


@dataclass(frozen=True)
class Evaluation:
    """Scores of one split in manifest order; `probabilities`, `labels` and `ids` never leave the site."""

    probabilities: np.ndarray  # float64 (n,), of label 1
    labels: np.ndarray  # int64 (n,)
    ids: list[str]
    metrics: dict[str, float | None]  # see metrics.binary_metrics

    def rows(self, split: str, model: str) -> list[list[Any]]:
        """The table of cases, under the columns of the task."""
        scored = zip(self.ids, self.labels.tolist(), self.probabilities.tolist(), strict=True)
        return [[id_, split, label, probability, model] for id_, label, probability in scored]

    def keep(self, folder: Path, model: str) -> None:
        """Nothing: a picture is told by its score."""


def score(
    learner: Learner,
    model: nn.Module,
    images: Images | Feed,
    anchor: Images | Feed | None = None,
    rows: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    precision: str = "float32",
) -> np.ndarray:
    """Probabilities float64 (n,) of label 1 for `rows` of `images` (all of them by default), in that order.

    `anchor` is needed by methods whose setting `test_partner` is not "self". The model's mode is left as it was.
    Raises `UserError` where a needed anchor is missing or a score is not finite.
    """
    device = torch.device(device)
    feed = images if isinstance(images, Feed) else Feed(images, device)
    rows = np.arange(len(feed)) if rows is None else np.asarray(rows)
    anchor_feed = Feed(anchor, device) if isinstance(anchor, Images) else anchor
    partners = learner.partner_rows(len(rows), len(anchor_feed) if anchor_feed is not None else 0)
    size = learner.training.batch_size
    parts = [np.empty(0)]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, precision):
            for start in range(0, len(rows), size):
                pulse.beat()
                part = slice(start, start + size)
                batch = channels_last(feed.batch(rows[part]))
                if partners is None:
                    probabilities = learner.predict(model, batch, "self").cpu().double()
                else:
                    assert anchor_feed is not None  # partner_rows has refused an absent anchor
                    scores = [
                        learner.predict(
                            model, batch, anchor_feed.batch(list_[part]).contiguous(memory_format=torch.channels_last)
                        )
                        .cpu()
                        .double()
                        for list_ in partners
                    ]
                    probabilities = torch.stack(scores).mean(0)
                parts.append(probabilities.numpy())
    finally:
        model.train(was_training)
    result = np.concatenate(parts)
    if not np.isfinite(result).all():
        raise UserError("the model gives scores that are not finite: lower setting 'lr' or use precision float32")
    return result
