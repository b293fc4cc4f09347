"""The task of classification: pictures with a label of 0 or 1, an anchor set beside them where the method has one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from heterosync.data.dataset import SiteData, load_site
from heterosync.data.pool import load_pool
from heterosync.errors import SiteError, UserError
from heterosync.models import Classifier, resolved_weights
from heterosync.training.augment import augment, draw_augmentation
from heterosync.training.batches import Batch, batch_bounds, plan_epoch
from heterosync.training.checks import check_machine, check_trainable, split_rows
from heterosync.training.evaluation import Evaluation, score
from heterosync.training.examples import Examples
from heterosync.training.feed import Feed, channels_last
from heterosync.training.learner import Learner
from heterosync.training.metrics import binary_metrics
from heterosync.training.seeds import stream
from heterosync.training.settings import TrainingSettings
from heterosync.training.task import Task

DIAGNOSTIC_ITEMS = 16


class Classification(Task):
    name = "classification"
    metric = "auc"
    shown = "AUC"
    undefined = "the validation split lacks a class"
    averaged = ("auc", "accuracy", "recall", "precision")
    reported = ("auc", "ci_low", "ci_high", "accuracy", "recall", "precision", "n", "n_positive")
    counted = ("n_positive", "positive")
    chance = 0.5
    columns = ("id", "split", "label", "probability", "model")
    items = "images"
    layout = torch.channels_last
    Settings = TrainingSettings

    def load(self, folder: Any, settings: TrainingSettings, need_anchor: bool, pooled: bool) -> SiteData:
        read: Callable[..., SiteData] = load_pool if pooled else load_site
        return read(folder, settings.image_size, settings.channels, need_anchor=need_anchor, fit=settings.fit)

    def open(
        self, learner: Learner, data: SiteData, site: str, device: torch.device, precision: str
    ) -> PictureExamples:
        return PictureExamples(learner, data, site, device, precision)

    def network(self, settings: TrainingSettings, weights: str) -> nn.Module:
        return Classifier(settings.backbone, settings.channels, weights)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return binary_cross_entropy_with_logits(outputs, targets)

    def in_words(self, settings: TrainingSettings) -> str:
        return f"{settings.backbone} at {settings.image_size} px"

    def initial_weights(self, settings: TrainingSettings) -> str:
        return resolved_weights(settings.weights, settings.backbone)

    def random_batch(self, learner: Learner, size: int, device: torch.device) -> Batch:
        side, channels = learner.training.image_size, learner.training.channels

        def half() -> tuple[Tensor, Tensor]:
            images = torch.rand(size, channels, side, side, device=device)
            return images.contiguous(memory_format=self.layout), (torch.arange(size, device=device) % 2).float()

        return Batch(*half(), *(half() if learner.uses_anchor else ()))


CLASSIFICATION = Classification()


class PictureExamples(Examples):
    """A site's pictures, decoded, at the settings' size."""

    def __init__(self, learner: Learner, data: SiteData, site: str, device: torch.device, precision: str):
        self._learner, self._data, self._site = learner, data, site
        self._device, self._precision = device, precision
        check_machine(site, device, precision)
        self._check_shapes()
        try:
            self._primary = learner.feed(data.primary, device, data.cache)
        except UserError as error:
            raise SiteError(f"site {site}: {error}") from error
        self._anchor = Feed(data.anchor, device) if data.anchor is not None else None

    def check_trainable(self) -> None:
        if self._learner.needs_anchor and (self._data.anchor is None or not len(self._data.anchor)):
            raise SiteError(
                f"site {self._site}: method '{self._learner.name}' needs the anchor pack: put it into anchor/"
            )
        check_trainable(self._site, self._data, CLASSIFICATION.items, 2)

    @property
    def count(self) -> int:
        return len(self._data.splits["train"])

    def chosen(self, round_: int, epoch: int, rows: np.ndarray) -> Iterator[Batch]:
        settings, anchor = self._learner.training, self._anchor if self._learner.uses_anchor else None
        rows = self._data.splits["train"][rows]
        labels = self._data.primary.labels[rows]
        plan = plan_epoch(labels, len(anchor) if anchor else 0, settings, self._site, round_, epoch)
        shown = rows[plan.primary]
        key = (settings.seed, self._site, round_, epoch)
        draws = {half: draw_augmentation(len(plan), stream(*key, "augment", half)) for half in ("primary", "anchor")}

        def half(feed: Feed, rows: np.ndarray, part: slice, name: str) -> tuple[Tensor, Tensor]:
            images = feed.batch(rows[part])
            if settings.augment:
                angles, flips = draws[name]
                images = augment(images, angles[part], flips[part])
            return channels_last(images), feed.labels(rows[part])

        for start, stop in batch_bounds(len(plan), settings.batch_size):
            part = slice(start, stop)
            first = half(self._primary, shown, part, "primary")
            if plan.anchor is None or anchor is None:
                yield Batch(*first)
            else:
                yield Batch(*first, *half(anchor, plan.anchor, part, "anchor"))

    def training(self, size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        rows = self._data.splits["train"] if rows is None else self._data.splits["train"][rows]
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield Batch(channels_last(self._primary.batch(part)), self._primary.labels(part))

    def anchor(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self._anchor or ()), size):
            assert self._anchor is not None
            part = np.arange(start, min(start + size, len(self._anchor)))
            yield Batch(channels_last(self._anchor.batch(part)), self._anchor.labels(part))

    def sample(self) -> Batch:
        def some(feed: Feed, rows: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
            rng = stream(self._learner.training.seed, self._site, "diagnostics", name)
            rows = np.sort(rng.permutation(rows)[:DIAGNOSTIC_ITEMS])
            return channels_last(feed.batch(rows)), feed.labels(rows)

        halves = some(self._primary, self._data.splits["train"], "primary")
        if self._learner.uses_anchor and self._anchor is not None:
            halves += some(self._anchor, np.arange(len(self._anchor)), "anchor")  # type: ignore[assignment]
        return Batch(*halves)

    def validate(self, model: nn.Module) -> tuple[float | None, float]:
        """AUC and mean log loss."""
        result = self.evaluate(model, "validation")
        p = np.clip(result.probabilities, 1e-12, 1 - 1e-12)
        losses = -np.where(result.labels == 1, np.log(p), np.log1p(-p))
        return result.metrics["auc"], float(losses.mean()) if len(losses) else 0.0

    def evaluate(self, model: nn.Module, split: str) -> Evaluation:
        rows, feeds = split_rows(self._site, self._data, split), (self._primary, self._anchor)
        try:
            probabilities = score(self._learner, model, *feeds, rows, self._device, self._precision)
        except UserError as error:
            raise SiteError(f"site {self._site}, {split} split: {error}") from error
        labels, ids = self._data.primary.labels[rows], [self._data.primary.ids[row] for row in rows]
        return Evaluation(probabilities, labels, ids, binary_metrics(labels, probabilities))

    def _check_shapes(self) -> None:
        settings = self._learner.training
        wanted = (settings.channels, settings.image_size, settings.image_size)
        for name, images in (("images", self._data.primary), ("anchor images", self._data.anchor)):
            if images is not None and tuple(images.pixels.shape[1:]) != wanted:
                found = tuple(images.pixels.shape[1:])
                raise SiteError(f"site {self._site}: {name} are {found}, training settings ask for {wanted}")
