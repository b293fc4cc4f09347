"""What a learning method is: plain federated learning of one network, and hooks for what differs.

A method is one small file: a subclass of `Method` (depth 1, no method imports another) that states its facts and
overrides only what it changes, plus one line in `methods/__init__.py`. The order of the calls in a round at a site:

    receive(model, shared) -> round_start(model, shared) -> loss(model, batch), correct_gradients(model) per step

then the best snapshot is loaded, `round_end` and `diagnostics` run, and `shared_names` of the model leave the site.
At the server `combine` makes the next global state of the mean of what came in.

A method whose network is cut (`split`) meets the server in every step instead: `loss` talks to the server's half by
`exchange`, and `serve` is that half. Its shared tensors go down before a round and do not come back.

Whatever a method remembers beside its network (a second network, control variates, a counter) is a tensor of the
model: declared in `shared_names` it travels, under its exact name, shape and type; otherwise it stays at the site, from
round to round and in its resume state. No other part of the system knows of it.
"""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from heterosync.errors import HeteroSyncError
from heterosync.training import CLASSIFICATION, Batch, LoopSettings, Task, setting
from heterosync.training import Settings as BaseSettings

Partner: TypeAlias = Tensor | Literal["self"]
#: The tensors of one message between a site and the server's half of a cut network.
Parcel: TypeAlias = dict[str, Tensor]
#: What such a message holds: name -> (shape of one image's part, type).
Form: TypeAlias = dict[str, tuple[tuple[int, ...], str]]


#: What leaves a site under every method, by the names of the allow-list (federation/wire.py) and with privacy class.
COMMON_LEAVES: tuple[str, ...] = (
    "W0, per round: val_auc_received, val_auc_best, best_epoch, train_loss, steps, seconds; for the two-task network "
    "also primary_gradient, anchor_gradient, anchor_gradient_ratio, partner_effect, mixture_share",
    "W0, per evaluated split: auc, ci_low, ci_high, accuracy, recall, precision",
    "W0, numbers of images: n_train and n_validation per round, n per evaluated split, counts of every split at the "
    "check-in",
    "W2, number of images of the positive label per evaluated split: n_positive",
    "at the check-in: site name, method, labels (the names of the two classes), anchor_digest (SHA-256 of the shared "
    "anchor set), model_hash (names and shapes), initial_weights (imagenet, none or a file's hash), precision, "
    "versions of heterosync, python, torch, torchvision, monai and nvflare",
)

#: The same for methods that segment volumes.
VOLUME_LEAVES: tuple[str, ...] = (
    "W0, per round: val_dice_received, val_dice_best, best_epoch, train_loss, steps, seconds",
    "W0, per evaluated split: dice, dice_sd, ci_low, ci_high, hd95, volume_error",
    "W0, numbers of volumes: n_train and n_validation per round, n and n_missed (nothing found) per evaluated split, "
    "counts of every split at the check-in",
    COMMON_LEAVES[-1],
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
    """One learning method. The defaults are the degenerate case: the task's network and loss, every tensor shared.

    Class attributes:
        name, title     as in a job and as in a report
        status          "exact", "code-faithful", "corrected" or "reconstruction" with respect to the citation
        citation        the source in one line
        leaves          all that leaves a site, in plain words with its privacy class (the job's README explains them):
                        the method's own tensors, then `COMMON_LEAVES` or `VOLUME_LEAVES`
        task            what is learned (training/task.py)
        weighting       fusion weights: "equal", "samples", "metric" (validation score of the model sent), "quality" (of
                        the model received) or "none" (nothing is exchanged); a setting of that name takes its place
        personal        each site is tested with its own model
        uses_anchor     the loss needs the anchor task
        pooled          one site holds the images of all: no federation, for comparison only
        needs_all       every site that takes part must contribute to every round
        only_updates    what a site sends is the state that it received, trained on: it can be clipped and noised
        split           the network is cut: the server trains the shared tensors itself, on what the sites send in every
                        step; all sites make as many steps, and their last state counts, not their best
        Settings        frozen dataclass of the hyper-parameters
    """

    name: ClassVar[str]
    title: ClassVar[str]
    status: ClassVar[str]
    citation: ClassVar[str]
    leaves: ClassVar[tuple[str, ...]]
    task: ClassVar[Task] = CLASSIFICATION
    weighting: str = "equal"
    personal: ClassVar[bool] = False
    uses_anchor: bool = False
    pooled: ClassVar[bool] = False
    needs_all: ClassVar[bool] = False
    only_updates: ClassVar[bool] = True
    split: ClassVar[bool] = False
    Settings: ClassVar[type[BaseSettings]] = NoSettings

    def __init__(self, settings: BaseSettings | None = None, training: LoopSettings | None = None):
        self.settings = settings if settings is not None else self.Settings()
        self.training: Any = training if training is not None else self.task.Settings()
        self.weighting = getattr(self.settings, "weighting", type(self).weighting)
        self.exchange: Callable[[Parcel], Parcel] | None = None  # split methods: ask the server, while a round runs

    @property
    def min_sites(self) -> int:
        """Sites that a run needs at least: two, where there is something to combine."""
        return 1 if self.pooled or self.weighting == "none" else 2

    @property
    def one_model(self) -> bool:
        """Whether a federation ends with one model for all, which also a site that did not train can use."""
        return self.weighting != "none" and not self.personal and not self.pooled

    @property
    def server_half(self) -> bool:
        """Whether the server does more than take the mean."""
        return self.split or type(self).combine is not Method.combine

    # -- the network ---------------------------------------------------------------------------------------------------

    def build_model(self, weights: str | None = None) -> nn.Module:
        """The network on the CPU with initial values drawn from `training.seed`; global generators stay as they are.

        `weights` replaces the setting of that name ("none" where the values come from the server anyway).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            return self.network(getattr(self.training, "weights", "none") if weights is None else weights)

    def network(self, weights: str) -> nn.Module:
        """Make the network; the generator is seeded already."""
        return self.task.network(self.training, weights)

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        """Exact names of the state tensors that leave a site and come back fused; the others stay personal."""
        return () if self.weighting == "none" else tuple(model.state_dict())

    def returned_names(self, model: nn.Module) -> tuple[str, ...]:
        """Of the shared tensors, those that a site sends after a round."""
        return () if self.split else self.shared_names(model)

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
        return self.task.loss(model(batch.images), batch.labels)

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

    # -- a network that is cut -----------------------------------------------------------------------------------------

    def parcels(self, model: nn.Module) -> tuple[Form, ...]:
        """What a site sends in each step, message by message."""
        return ()

    def serve(
        self, model: nn.Module, update: Callable[[Tensor, Tensor], bool], precision: str
    ) -> Generator[list[Parcel], list[Parcel], None]:
        """The server's half of all steps: gets the sites' messages in site-name order, yields their answers.

        update(logits, gradient of the loss by them): back-propagate and step; False where that was not finite.
        """
        raise HeteroSyncError(f"method {self.name} is not split")

    # -- scores --------------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
        """Images (b, c, h, w), already on the model's device -> probabilities (b,) of label 1; of volumes, by voxel.

        `partner`: "self", or images (b, c, h, w) of the anchor set for methods that look at two images.
        """
        return torch.sigmoid(model(images))

    def partner_rows(self, n_images: int, n_anchor: int) -> np.ndarray | None:
        """Anchor rows (k, n_images) whose k scores are averaged; None: every image is its own partner."""
        return None


def bytes_per_round(method: Method, model: nn.Module) -> int:
    """Bytes of the tensors that a site sends after one round (and receives before it), without message overhead."""
    state = model.state_dict()
    return sum(state[name].numel() * state[name].element_size() for name in method.returned_names(model))


def bytes_per_image(method: Method, model: nn.Module) -> int:
    """Bytes that a site of a split method sends for one training image in one epoch; 0 for the others."""
    forms = [form for parcel in method.parcels(model) for form in parcel.values()]
    return sum(math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in forms)


def traffic(method: Method, model: nn.Module) -> str:
    """In words, what one site sends: "42.7 MiB" per round, "0.38 MiB per image and epoch", or "nothing"."""
    image, round_ = bytes_per_image(method, model), bytes_per_round(method, model)
    if image:
        return f"{image / 2**20:.2f} MiB per image and epoch"
    return f"{round_ / 2**20:.1f} MiB" if round_ else "nothing"
