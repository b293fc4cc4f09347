"""What a learning method is: plain federated learning of one network, and hooks for what differs.

A method is one small file: a subclass of `Method`, or of a base that several share (no method imports another), that
states its facts and overrides only what it changes, plus one line in `methods/__init__.py`. The calls in a round at a
site:

    receive(model, shared) -> round_start(model, shared, examples) -> if it `trains`, for each epoch: `batches`, and
    loss(model, batch), correct_gradients(model) per step

then the best snapshot is loaded, `round_end` and `diagnostics` run, and `returned_names` of the model leave the site.
At the server `combine` makes the next global state of the mean of what came in, or `fuse` of each site's own answer;
`for_site` says what one site gets of it.

A method whose network is cut (`split`) meets the server in every step instead: `loss` talks to the server's half by
`exchange`, and `serve` is that half. Its shared tensors go down before a round and do not come back.

Whatever a method remembers beside its network (a second network, control variates, a counter, a pool of images) is a
tensor of the model: in `shared_names` it comes down, in `returned_names` it goes up, under its exact name, shape and
type; otherwise it stays at the site, from round to round and in its resume state. No other part of the system knows.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from heterosync.data.images import Images
from heterosync.errors import HeteroSyncError
from heterosync.methods.answer import Answer
from heterosync.methods.leaves import COMMON_LEAVES, SCALAR_LEAVES, VOLUME_LEAVES
from heterosync.methods.settings import EqualWeights, NoSettings, SampleWeights
from heterosync.training import CLASSIFICATION, Batch, Examples, LoopSettings, Task
from heterosync.training import Settings as BaseSettings
from heterosync.training.feed import Feed

#: What the file of a method needs, from here and from the files beside this one.
__all__ = [
    "COMMON_LEAVES",
    "SCALAR_LEAVES",
    "STATUS",
    "VOLUME_LEAVES",
    "EqualWeights",
    "Form",
    "Method",
    "NoSettings",
    "Parcel",
    "Partner",
    "SampleWeights",
]

Partner: TypeAlias = Tensor | Literal["self"]
#: The tensors of one message between a site and the server's half of a cut network.
Parcel: TypeAlias = dict[str, Tensor]
#: What such a message holds: name -> (shape of one image's part, type).
Form: TypeAlias = dict[str, tuple[tuple[int, ...], str]]


#: How near a method is to its citation, in words.
STATUS: dict[str, str] = {
    "exact": "as the source defines it",
    "code-faithful": "as the official code does it, where the paper says less or something else",
    "corrected": "as the source means it, without defects of the published code, which the method's file names",
    "reconstruction": "rebuilt, since the source leaves essential parts open or cannot be had",
    "variant": "a form of it that is this project's own",
}


class Method(ABC):
    """One learning method. The defaults are the degenerate case: the task's network and loss, every tensor shared.

    Class attributes:
        name, title     as in a job and as in a report
        status          how near it is to its citation: one of `STATUS`
        citation        the source in one line
        leaves          all that leaves a site, in plain words with its privacy class (the job's README explains them):
                        the method's own tensors, then `COMMON_LEAVES` or `VOLUME_LEAVES`
        task            what is learned (training/task.py)
        scalars         names of scalars that its sites report in every round beside the common ones (`diagnostics`), of
                        federation/wire.py, and with their line of `SCALAR_LEAVES` in `leaves`
        weighting       fusion weights: "equal", "samples", "metric" (validation score of the model sent), "quality" (of
                        the model received), a name of `scalars`, or "none" (nothing is exchanged); a setting of that
                        name takes its place
        personal        each site is tested with its own model
        uses_anchor     the loss needs the anchor task
        couples         it may have an anchor task, and reports how that reaches the primary one (wire.COUPLING)
        pooled          one site holds the images of all: no federation, for comparison only
        needs_all       every site that takes part must contribute to every round
        only_updates    what a site sends is the state that it received, trained on: it can be clipped and noised
        split           the network is cut: the server trains the shared tensors itself, on what the sites send in every
                        step; all sites make as many steps, and their last state counts, not their best
        goes_on         it begins with an earlier model, which the training setting `weights` names
        memory_by_site  prefixes of what the server remembers of one site each, before the site's name: between the jobs
                        of a training sites may join and leave
        stand_in        something made up takes the place of a public model: a study's labels have to say so
        unheeded        training settings that do not count, as `job describe` tells; jobs of a comparison share theirs
        topology        who combines, unless a job says otherwise: "star", the server; "swarm", the sites in turn
        Settings        frozen dataclass of the hyper-parameters
        Training        frozen dataclass of the training settings; None: the task's
    """

    name: ClassVar[str]
    title: ClassVar[str]
    status: ClassVar[str]
    citation: ClassVar[str]
    leaves: ClassVar[tuple[str, ...]]
    task: ClassVar[Task] = CLASSIFICATION
    scalars: ClassVar[tuple[str, ...]] = ()
    weighting: str = "equal"
    personal: ClassVar[bool] = False
    uses_anchor: bool = False
    couples: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    needs_all: ClassVar[bool] = False
    only_updates: ClassVar[bool] = True
    split: ClassVar[bool] = False
    goes_on: ClassVar[bool] = False
    memory_by_site: ClassVar[tuple[str, ...]] = ()
    stand_in: bool = False
    unheeded: ClassVar[tuple[str, ...]] = ()
    topology: ClassVar[str] = "star"
    Settings: ClassVar[type[BaseSettings]] = NoSettings
    Training: ClassVar[type[LoopSettings] | None] = None

    def __init__(self, settings: BaseSettings | None = None, training: LoopSettings | None = None):
        self.settings = settings if settings is not None else self.Settings()
        self.training: Any = training if training is not None else self.recipe()
        self.weighting = getattr(self.settings, "weighting", type(self).weighting)
        self.exchange: Callable[[Parcel], Parcel] | None = None  # split methods: ask the server, while a round runs
        self.tell: Callable[[str], None] = lambda line: None  # how far a long piece of work is, for the log

    @classmethod
    def recipe(cls, values: Mapping[str, Any] | None = None) -> LoopSettings:
        """The training settings, defaults but for `values`. Raises `UserError` for an unknown name or bad value."""
        return (cls.Training or cls.task.Settings).from_dict(values)

    @property
    def min_sites(self) -> int:
        """Sites that a run needs at least: two, where there is something to combine."""
        return 1 if self.pooled or self.weighting == "none" else 2

    @property
    def one_model(self) -> bool:
        """Whether a federation ends with one network for all, which also a site that did not train can use."""
        return self.weighting != "none" and not (self.personal or self.pooled or self.per_site)

    @property
    def server_half(self) -> bool:
        """Whether the server does more than take the mean and send it to all."""
        changed = any(getattr(type(self), hook) is not getattr(Method, hook) for hook in ("combine", "returned_names"))
        return self.split or self.individual or self.per_site or changed

    @property
    def individual(self) -> bool:
        """Whether the server must see the answer of each site: `fuse` takes the place of mean and `combine`."""
        return type(self).fuse is not Method.fuse

    @property
    def per_site(self) -> bool:
        """Whether sites are sent different things."""
        return type(self).for_site is not Method.for_site

    @property
    def needs_provisioned(self) -> bool:
        """Whether every site must hold a network beside its data (`provisioned`)."""
        return type(self).provisioned is not Method.provisioned

    @property
    def needs_anchor(self) -> bool:
        """Whether every site must hold the alliance's anchor pack, be it for something else than an anchor task."""
        return self.uses_anchor

    # -- the network ---------------------------------------------------------------------------------------------------

    def build_model(self, weights: str | None = None) -> nn.Module:
        """The network on the CPU with initial values drawn from `training.seed`; global generators stay as they are.

        `weights` replaces the setting of that name ("none" where the values come from the server anyway).
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            return self.network(getattr(self.training, "weights", "none") if weights is None else weights)

    @classmethod
    def first_weights(cls, training: Any) -> str:
        """What the network starts from on this machine, for the check-in and the records: none, imagenet or a file's
        hash. Raises `UserError` when that is not here."""
        return cls.task.initial_weights(training)

    def provisioned(self) -> str | None:
        """What the network is that every site has beside its data and that is never trained or sent, for the check-in:
        "file sha256:…" or "stand-in"; None without one. Raises `UserError` when it is not here."""
        return None

    def in_words(self) -> str:
        """Network and size of what it sees."""
        return self.task.in_words(self.training)

    def network(self, weights: str) -> nn.Module:
        """Make the network; the generator is seeded already."""
        return self.task.network(self.training, weights)

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        """Exact names of the state tensors that come from the server: the global state. The others stay personal."""
        return () if self.weighting == "none" else tuple(model.state_dict())

    def returned_names(self, model: nn.Module) -> tuple[str, ...]:
        """Exact names of the state tensors that a site sends after a round: by default those that came."""
        return () if self.split else self.shared_names(model)

    def own_names(self, model: nn.Module) -> tuple[str, ...]:
        """Names of the state tensors whose values at the site count when a round starts: those not shared."""
        shared = set(self.shared_names(model))
        return tuple(name for name in model.state_dict() if name not in shared)

    def feed(self, images: Images, device: torch.device, cache: Path | None) -> Feed:
        """A site's images as the network gets them; what is made of them may be kept in the folder `cache`."""
        return Feed(images, device)

    # -- a round at a site ---------------------------------------------------------------------------------------------

    def receive(self, model: nn.Module, shared_state: Mapping[str, Tensor]) -> None:
        """Put a fused state (exactly `shared_names`, checked) into the model; personal tensors keep their values."""
        model.load_state_dict(dict(shared_state), strict=False)

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        """Before the received model is scored and the first step; `examples` are the site's own."""

    def trains(self, model: nn.Module) -> bool:
        """Whether the site trains in this round; if not, it scores what it received and sends it back."""
        return True

    def batches(self, model: nn.Module, examples: Examples, round_: int, epoch: int) -> Iterator[Batch]:
        """What one local epoch trains on; an epoch without a batch ends the round.

        The model is in training mode, and so it must be left, with `requires_grad` as it was; steps of the method's own
        with an optimiser of its own are allowed in between, also in `round_start` and `round_end`.
        """
        return examples.batches(round_, epoch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar to minimise for one batch."""
        return self.task.loss(model(batch.images), batch.labels)

    def correct_gradients(self, model: nn.Module) -> None:
        """Between the backward pass of a step, whose gradients are finite, and the optimiser."""

    def round_end(self, model: nn.Module, examples: Examples) -> None:
        """After the last step; the model holds the best snapshot, and what is set here becomes part of it."""

    def diagnostics(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        """Scalars about the mechanism and `scalars`, at the end of each round; leaves model, gradients and generators
        as they were. No image is read for it but those asked for, such as `examples.sample()`."""
        return {}

    # -- at the server -------------------------------------------------------------------------------------------------

    def server_memory(self, sites: tuple[str, ...]) -> dict[str, Tensor]:
        """What the server remembers from round to round beside the global state, before the first round.

        `sites` take part, in name order. Names and shapes stay the same. It is stored with the global state.
        """
        return {}

    def for_site(self, state: Mapping[str, Tensor], memory: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
        """What one site is sent of a global state, with the server's memory of that moment: `shared_names` too."""
        return dict(state)

    def combine(
        self, sent: Mapping[str, Tensor], fused: dict[str, Tensor], memory: dict[str, Tensor], sites: int
    ) -> dict[str, Tensor]:
        """The next global state, from the one sent out and the mean of the answers of `sites` sites.

        `memory` may be changed. Tensors are on the CPU; those of `sent` must stay as they are.
        """
        return fused

    def fuse(
        self, sent: Mapping[str, Tensor], answers: Mapping[str, Answer], memory: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The next global state, all of `shared_names`, from what each site sent (site -> answer, in name order).

        In place of `combine`, where overridden; the same rules. `answer.mean` is the mean of the other methods. Global
        generators are put back afterwards; randomness comes from a generator of its own, of the seed and the round.
        """
        raise HeteroSyncError(f"method {self.name} takes the mean")

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
