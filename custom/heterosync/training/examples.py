"""One site's data as training sees it, whatever kind of data it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import nn

from heterosync.training.batches import Batch


class Outcome(Protocol):
    """Scores of one split: `metrics` by name (None: undefined) may be reported, the table of cases stays there."""

    @property
    def metrics(self) -> dict[str, float | None]: ...

    def rows(self, split: str, model: str) -> list[list[Any]]:
        """The rows of predictions.csv, under the task's `columns`."""

    def keep(self, folder: Path, model: str) -> None:
        """Write what else shall stay at the site beside that table, for the scores of `model`."""


class Examples(ABC):
    """One site's data as the loop sees it, on the training device."""

    @abstractmethod
    def check_trainable(self) -> None:
        """Raises `UserError` where there is too little to train on; a site may also only evaluate."""

    def batches(self, round_: int, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch; they depend on (seed, site, round, epoch) alone."""
        return self.chosen(round_, epoch, np.arange(self.count))

    @property
    @abstractmethod
    def count(self) -> int:
        """Number of rows of the training split."""

    @abstractmethod
    def chosen(self, round_: int, epoch: int, rows: np.ndarray) -> Iterator[Batch]:
        """An ordinary epoch (sampler, augmentation, batch size) over only these positions of the training split, as
        if it held no others. With all of them in order, it is `batches`."""

    @abstractmethod
    def training(self, size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """The training split, or these positions of it, in order, `size` at a time, each once, not augmented; without
        anchor halves."""

    def anchor(self, size: int) -> Iterator[Batch]:
        """The anchor set in order, `size` at a time, not augmented, as primary halves; nothing where there is none."""
        return iter(())

    @abstractmethod
    def sample(self) -> Batch:
        """A small batch that is the same in every round, for a method's diagnostics."""

    @abstractmethod
    def validate(self, model: nn.Module) -> tuple[float | None, float]:
        """The task's metric on the validation split (None: undefined), and a loss to go by where it is undefined."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str) -> Outcome:
        """All scores of a split. Raises `UserError` where they are not finite."""
