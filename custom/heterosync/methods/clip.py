"""CLIP features: a frozen public encoder looks at the images once, and the sites train a small head together."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from heterosync.data.images import Images
from heterosync.errors import UserError
from heterosync.methods.base import COMMON_LEAVES, Method, Partner, SampleWeights
from heterosync.models.clip import ACTIVATIONS, SHAPES, STAND_IN, Head, StandIn, load_tower
from heterosync.models.encoder import cached_file, file_mark
from heterosync.training import Batch, TrainingSettings, setting
from heterosync.training.feed import Feed
from heterosync.training.frozen import FrozenFeed


@dataclass(frozen=True)
class ClipSettings(SampleWeights):
    what: ClassVar[str] = "clip"

    clip_model: str = setting(
        "ViT-B/32", "[R] the image tower; stand-in: no CLIP at all, for tests and demos", choices=(*SHAPES, STAND_IN)
    )
    file: str = setting(
        "", "[own] name of its file in torch's cache (hub/checkpoints); empty: OpenAI's, as ViT-B-32.pt"
    )
    sha256: str = setting("", "[own] first digits, 12 at least, of the hash that the file must have; empty: any")
    activation: str = setting(
        "quick_gelu", "[C] of OpenAI's towers; open_clip's of LAION have gelu", choices=tuple(ACTIVATIONS)
    )
    head_hidden: int = setting(0, "[R] width of a layer with ReLU before the last; 0: none", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if os.path.basename(self.file) != self.file:
            raise UserError(f"clip setting 'file' is '{self.file}': give a name in torch's cache, not a path")
        if self.sha256 and not re.fullmatch("[0-9a-f]{12,64}", self.sha256):
            raise UserError(f"clip setting 'sha256' is '{self.sha256}': give 12 to 64 hexadecimal digits")

    def idle(self) -> dict[str, str]:
        return (
            dict.fromkeys(("file", "sha256", "activation"), "a clip_model of CLIP")
            if self.clip_model == STAND_IN
            else {}
        )


class Clip(Method):
    """Radford et al., "Learning transferable visual models from natural language supervision", ICML 2021, as features
    for federated learning (Hu et al. 2025, Real-world validation, name no encoder file, head or rule).

        once, site k:  z_i = f(x_i) / |f(x_i)|,   f: CLIP's image tower, frozen       kept on the site's disk
        site k:        min  BCE(h(z))   over the head h alone             server:  h <- sum_k (n_k / n) h_k

    x is fitted as CLIP's: the shorter side to 224, bicubic, the middle of the longer one, CLIP's mean and deviation.
    Each site must have the tower's file; its hash goes into the check-in, and sites whose files differ are refused. It
    stands in run.json and in every model file: no other tower will do to go on with a training, nor to predict; with
    `sha256` set, nor to begin one. The training settings `image_size`, `channels`,
    `fit`, `augment` and `precision` are the tower's (224, 3, crop, no augmentation, float32), whatever the job says;
    `backbone` and `weights` concern networks that this method has not.
    `clip_model: stand-in` puts a fixed random layer in CLIP's place, which sees the job's images at the job's size: it
    shows that the machinery works and says nothing about CLIP.

    Sent: the head, 513 numbers, 2.0 KiB per round.

    Degenerates: into FedAvg of logistic regression on the features; with one site into local learning of it.
    """

    name = "clip"
    title = "CLIP features"
    status = "reconstruction"
    citation = "Radford et al., ICML 2021, arXiv 2103.00020; encoder, head and rule are a reconstruction"
    leaves = ("W1: the tensors of the head on top of the frozen encoder, `head.*`", *COMMON_LEAVES)
    unheeded = ("image_size", "channels", "fit", "augment", "precision", "backbone", "weights")
    Settings = ClipSettings
    settings: ClipSettings
    _encoder: nn.Module | None = None

    def __init__(self, settings: ClipSettings | None = None, training: TrainingSettings | None = None):
        super().__init__(settings, training)
        seen: dict[str, Any] = {"augment": False, "precision": "float32"}
        if self._shape is not None:
            seen |= {"image_size": self._shape.side, "channels": 3, "fit": "crop"}
        self.training = replace(self.training, **seen)
        if self.settings.clip_model == STAND_IN:
            self.stand_in, self.title = True, "Stand-in for CLIP features"  # type: ignore[misc]

    @property
    def _shape(self) -> Any:
        return SHAPES.get(self.settings.clip_model)

    @classmethod
    def first_weights(cls, training: Any) -> str:
        return "none"  # of the head; the tower stands in the check-in

    def network(self, weights: str) -> nn.Module:
        return Head(self._shape.outputs if self._shape else StandIn.OUTPUTS, self.settings.head_hidden)

    def in_words(self) -> str:
        if self._shape is None:
            return f"a head on a stand-in for CLIP's encoder (not CLIP) at {self.training.image_size} px"
        head = f"a head on CLIP's frozen {self.settings.clip_model} at {self.training.image_size} px"
        return f"{head},\nwhose file `{self._name}` every site has in torch's cache (hub/checkpoints; docs/clip.md)"

    # -- the encoder ---------------------------------------------------------------------------------------------------

    def provisioned(self) -> str:
        if self._shape is None:
            return STAND_IN
        found, wanted = file_mark(self._file()), self.settings.sha256
        if not found.partition(":")[2].startswith(wanted):
            raise UserError(
                f"method clip: {self._file()} is {found}, the job's models go with sha256:{wanted}: get that file"
            )
        return found

    @property
    def _name(self) -> str:
        return self.settings.file or f"{self.settings.clip_model.replace('/', '-')}.pt"

    def _file(self) -> Path:
        kind, path = self.settings.clip_model, cached_file(self._name)
        if not path.is_file():
            raise UserError(
                f"method clip needs the file of CLIP's {kind}, and {path} does not exist: put it there, name another "
                f"with clip setting 'file', or set 'clip_model' to {STAND_IN} for a trial without CLIP"
            )
        return path

    def encode(self, images: Tensor) -> Tensor:
        """Images (b, c, h, w) in [0, 1] -> features (b, d) of length 1; features as they are."""
        if images.ndim == 2:
            return images
        if self._encoder is None:
            s = self.settings
            if self.provisioned() == STAND_IN:
                self._encoder = StandIn(self.training.channels)
            else:
                self._encoder = load_tower(self._file(), s.clip_model, s.activation)
        with torch.autocast(images.device.type, enabled=False):
            return self._encoder.to(images.device)(images.float())

    def feed(self, images: Images, device: torch.device, cache: Path | None) -> Feed:
        encoder = " ".join((self.settings.clip_model, self.provisioned(), self.settings.activation))
        return FrozenFeed(images, device, self.encode, encoder, cache)

    # -- the head ------------------------------------------------------------------------------------------------------

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.task.loss(model(self.encode(batch.images)), batch.labels)

    def predict(self, model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
        return torch.sigmoid(model(self.encode(images)))
