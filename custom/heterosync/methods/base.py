"""What a learning method is: plain federated learning of one classifier, and hooks for what differs.

A method is one small file: a subclass of `Method` (depth 1, no method imports another) that states its facts and
overrides only what it changes, plus one line in `methods/__init__.py`. The order of the calls in a round at a site:

    receive(model, shared) -> round_start(model, shared) -> loss(model, batch), correct_gradients(model) per step

then the best snapshot is loaded, `round_end` and `diagnostics` run, and `shared_names` of the model leave the site.
At the server `combine` makes the next global state of the mean of what came in.

Whatever a method remembers beside its network (a second network, control variates, a counter) is a tensor of the
model: declared in `shared_names` it travels, under its exact name, shape and type; otherwise it stays at the site, from
round to round and in its resume state. No other part of the system knows of it.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from heterosync.models import Classifier
from heterosync.training import Batch, TrainingSettings, setting
from heterosync.training import Settings as BaseSettings

Partner: TypeAlias = Tensor | Literal["self"]


#: What leaves a site under every method, by the names of the allow-list (federation/wire.py) and with privacy class.
COMMON_LEAVES: tuple[str, ...] = (
    "W0, per round: val_auc_received, val_auc_best, best_epoch, train_loss, steps, seconds; for the two-task network "
    "also anchor_gradient_ratio, partner_effect, mixture_share",
    "W0, per evaluated split: auc, ci_low, ci_high, accuracy, recall, precision",
    "W0, numbers of images: n_train and n_validation per round, n per evaluated split, counts of every split at the "
    "check-in",
    "W2, number of images of the positive label per evaluated split: n_positive",
    "at the check-in: site name, method, labels (the names of the two classes), anchor_digest (SHA-256 of the shared "
    "anchor set), model_hash (names and shapes), initial_weights (imagenet, none or a file's hash), precision, "
    "versions of heterosync, python, torch, torchvision and nvflare",
)


@dataclass(frozen=True)
class NoSettings(BaseSettings):
    """For methods without hyper-parameters of their own."""

    what: ClassVar[str] = "method"


@dataclass(frozen=True)
class SampleWeights(BaseSettings):
    """For methods whose papers weigh sites by their number of training images."""

    weighting: str = setting("samples", "[M] n_k / n; equal: 1 / K", choices=("samples", "equal"))


@dataclass(frozen=True)
class EqualWeights(BaseSettings):
    """For methods whose papers or official codes give every site the same weight."""

    weighting: str = setting("equal", "[M]/[C] 1 / K; samples: n_k / n", choices=("equal", "samples"))


class Method(ABC):
    """One learning method. The defaults are the degenerate case: one classifier, BCE, every tensor shared.

    Class attributes:
        name, title     as in a job and as in a report
        status          "exact", "code-faithful", "corrected" or "reconstruction" with respect to the citation
        citation        the source in one line
        leaves          all that leaves a site, in plain words with its privacy class (the job's README explains them):
                        the method's own tensors, then `COMMON_LEAVES`
        weighting       fusion weights: "equal", "samples", or "none" (nothing is exchanged); a setting of that name
                        takes its place
        personal        each site is tested with its own model
        uses_anchor     the loss needs the anchor task
        pooled          one site holds the images of all: no federation, for comparison only
        needs_all       every site that takes part must contribute to every round
        only_updates    what a site sends is the state that it received, trained on: it can be clipped and noised
        Settings        frozen dataclass of the hyper-parameters
    """

    name: ClassVar[str]
    title: ClassVar[str]
    status: ClassVar[str]
    citation: ClassVar[str]
    leaves: ClassVar[tuple[str, ...]]
    weighting: str = "equal"
    personal: ClassVar[bool] = False
    uses_anchor: bool = False
    pooled: ClassVar[bool] = False
    needs_all: ClassVar[bool] = False
    only_updates: ClassVar[bool] = True
    Settings: ClassVar[type[BaseSettings]] = NoSettings

    def __init__(self, settings: BaseSettings | None = None, training: TrainingSettings | None = None):
        self.settings = settings if settings is not None else self.Settings()
        self.training = training if training is not None else TrainingSettings()
        self.weighting = getattr(self.settings, "weighting", type(self).weighting)

    @property
    def min_sites(self) -> int:
        """Sites that a run needs at least: two, where there is something to combine."""
        return 1 if self.pooled or self.weighting == "none" else 2

    @property
    def server_half(self) -> bool:
        """Whether the server does more than take the mean."""
        return type(self).combine is not Method.combine

    # -- the network ---------------------------------------------------------------------------------------------------

    def build_model(self, weights: str | None = None) -> nn.Module:
        """The network on the CPU with initial values drawn from `training.seed`; global generators stay as they are.

        `weights` replaces the setting of that name ("none" where the values come from the server anyway).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            return self.network(self.training.weights if weights is None else weights)

    def network(self, weights: str) -> nn.Module:
        """Make the network; the generator is seeded already."""
        return Classifier(self.training.backbone, self.training.channels, weights)

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        """Exact names of the state tensors that leave a site and come back fused; the others stay personal."""
        return () if self.weighting == "none" else tuple(model.state_dict())

    def own_names(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the state tensors whose values at the site count when a round starts: those not shared."""
        shared = set(self.shared_names(model))
        return tuple(name for name in model.state_dict() if name not in shared)

    # -- a round at a site ---------------------------------------------------------------------------------------------

    def receive(self, model: nn.Module, shared_state: Mapping[str, Tensor]) -> None:
        """Put a fused state (exactly `shared_names`, checked) into the model; personal tensors keep their values."""
        model.load_state_dict(dict(shared_state), strict=False)

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor]) -> None:
        """Before the first step; for methods whose loss refers to the received state."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar to minimise for one batch."""
        return bce(model(batch.images), batch.labels)

    def correct_gradients(self, model: nn.Module) -> None:
        """Between the backward pass of a step, whose gradients are finite, and the optimiser."""

    def round_end(self, model: nn.Module) -> None:
        """After the last step; the model holds the best snapshot, and what is set here becomes part of it."""

    def diagnostics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        """Scalars about the mechanism, once per round; must leave model, gradients and generators as they were."""
        return {}

    # -- at the server -------------------------------------------------------------------------------------------------

    def server_memory(self) -> dict[str, Tensor]:
        """What the server remembers from round to round beside the global state, before the first round."""
        return {}

    def combine(
        self, sent: Mapping[str, Tensor], fused: dict[str, Tensor], memory: dict[str, Tensor], sites: int
    ) -> dict[str, Tensor]:
        """The next global state, from the one sent out and the mean of the answers of `sites` sites.

        `memory` may be changed. Tensors are on the CPU; those of `sent` must stay as they are.
        """
        return fused

    # -- scores --------------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
        """Images (b, c, h, w), already on the model's device -> probabilities (b,) of label 1.

        `partner`: "self", or images (b, c, h, w) of the anchor set for methods that look at two images.
        """
        return torch.sigmoid(model(images))

    def partner_rows(self, n_images: int, n_anchor: int) -> np.ndarray | None:
        """Anchor rows (k, n_images) whose k scores are averaged; None: every image is its own partner."""
        return None


def bytes_per_round(method: Method, model: nn.Module) -> int:
    """Bytes that a site sends (and receives) in one round, without message overhead."""
    state = model.state_dict()
    return sum(state[name].numel() * state[name].element_size() for name in method.shared_names(model))
