"""What is learned, apart from how sites learn it together: the seam between the one local loop and its kinds of data.

A `Method` names its `Task`; the task reads a site's data, makes batches of it and scores models on it. There is one
task for pictures and their labels (classification.py) and one for volumes and their masks (segmentation.py); nothing
outside asks which one it has.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from heterosync.data.site_yaml import SiteKeys
from heterosync.training.batches import Batch
from heterosync.training.examples import Examples
from heterosync.training.learner import Learner
from heterosync.training.settings import LoopSettings


class LocalData(Protocol):
    """What a site and its federation ask of loaded data: names of the two classes, rows by split, site.yaml."""

    @property
    def labels(self) -> tuple[str, str]: ...

    @property
    def splits(self) -> dict[str, np.ndarray]: ...

    @property
    def anchor_digest(self) -> str | None: ...

    @property
    def config(self) -> SiteKeys: ...


class Task(ABC):
    """Class attributes:

    name        as in a report
    metric      the scalar by which epochs, rounds and models are chosen: higher is better
    shown       its name in texts
    undefined   why a validation split may lack it
    averaged    metrics whose mean over sites is told
    reported    what is told of a test set, in this order: the metric, its 95 % interval, all else
    counted     what stands behind the number of a test set's items: the metric that counts them, and in words
    chance      the metric's value by guessing, where it has one
    columns     of predictions.csv
    items       what a site has many of, in the plural
    layout      memory format of batches and networks
    Settings    the settings of training
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    shown: ClassVar[str]
    undefined: ClassVar[str]
    averaged: ClassVar[tuple[str, ...]]
    reported: ClassVar[tuple[str, ...]]
    counted: ClassVar[tuple[str, str]]
    chance: ClassVar[float | None] = None
    columns: ClassVar[tuple[str, ...]]
    items: ClassVar[str]
    layout: ClassVar[torch.memory_format]
    Settings: ClassVar[type[LoopSettings]]

    @property
    def received(self) -> str:
        """Name of the received model's score among the scalars of a round."""
        return f"val_{self.metric}_received"

    @property
    def best(self) -> str:
        """Name of the score of the model that a site sends."""
        return f"val_{self.metric}_best"

    @property
    def scalars(self) -> frozenset[str]:
        """Names of all scores that a site tells."""
        return frozenset({self.received, self.best, *self.reported})

    @abstractmethod
    def load(self, folder: Any, settings: Any, need_anchor: bool, pooled: bool) -> LocalData:
        """Read a site folder (pooled: several, as one). Raises `ProblemList` with every problem."""

    @abstractmethod
    def open(self, learner: Learner, data: Any, site: str, device: torch.device, precision: str) -> Examples:
        """The data as the loop needs it. Raises `UserError` where it does not fit the settings."""

    @abstractmethod
    def network(self, settings: Any, weights: str) -> nn.Module:
        """The network of methods that bring none; the generator is seeded already."""

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of methods that bring none."""

    @abstractmethod
    def in_words(self, settings: Any) -> str:
        """Network and size of what it sees."""

    @abstractmethod
    def initial_weights(self, settings: Any) -> str:
        """What the first weights are: none, imagenet or a file's hash. Raises `UserError` when they are not here."""

    @abstractmethod
    def random_batch(self, learner: Learner, size: int, device: torch.device) -> Batch:
        """Meaningless data of the right shapes, for measuring how long a step takes."""


class TaskLearner(Learner, Protocol):
    """A learner that says what it learns."""

    @property
    def task(self) -> Task: ...
