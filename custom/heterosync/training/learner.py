"""What the local loop asks of a learning method; `heterosync.methods.base.Method` is its one implementation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from torch import Tensor, nn

from heterosync.training.batches import Batch
from heterosync.training.settings import Settings


class Learner(Protocol):
    uses_anchor: bool
    split: ClassVar[bool]
    settings: Settings
    training: Any  # of the task's settings class

    @property
    def name(self) -> str: ...

    def build_model(self, weights: str | None = None) -> nn.Module: ...

    def shared_names(self, model: nn.Module) -> tuple[str, ...]: ...

    def own_names(self, model: nn.Module) -> tuple[str, ...]: ...

    def receive(self, model: nn.Module, shared_state: Mapping[str, Tensor]) -> None: ...

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor]) -> None: ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor: ...

    def correct_gradients(self, model: nn.Module) -> None: ...

    def round_end(self, model: nn.Module) -> None: ...

    def predict(self, model: nn.Module, images: Tensor, partner: Tensor | Literal["self"]) -> Tensor: ...

    def partner_rows(self, n_images: int, n_anchor: int) -> np.ndarray | None: ...

    def diagnostics(self, model: nn.Module, batch: Batch) -> dict[str, float]: ...
