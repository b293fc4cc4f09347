"""What the local loop asks of a learning method; `heterosync.methods.base.Method` is its one implementation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from heterosync.data.images import Images
from heterosync.training.batches import Batch
from heterosync.training.examples import Examples
from heterosync.training.settings import Settings

if TYPE_CHECKING:
    from heterosync.training.feed import Feed


class Learner(Protocol):
    uses_anchor: bool
    split: ClassVar[bool]
    settings: Settings
    training: Any  # of the task's settings class

    @property
    def name(self) -> str: ...

    @property
    def needs_anchor(self) -> bool: ...

    def build_model(self, weights: str | None = None) -> nn.Module: ...

    def shared_names(self, model: nn.Module) -> tuple[str, ...]: ...

    def own_names(self, model: nn.Module) -> tuple[str, ...]: ...

    def feed(self, images: Images, device: torch.device, cache: Path | None) -> Feed: ...

    def receive(self, model: nn.Module, shared_state: Mapping[str, Tensor]) -> None: ...

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None: ...

    def trains(self, model: nn.Module) -> bool: ...

    def batches(self, model: nn.Module, examples: Examples, round_: int, epoch: int) -> Iterator[Batch]: ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...

    def correct_gradients(self, model: nn.Module) -> None: ...

    def round_end(self, model: nn.Module, examples: Examples) -> None: ...

    def predict(self, model: nn.Module, images: Tensor, partner: Tensor | Literal["self"]) -> Tensor: ...

    def partner_rows(self, n_images: int, n_anchor: int) -> np.ndarray | None: ...

    def diagnostics(self, model: nn.Module, examples: Examples) -> dict[str, float]: ...
