"""FedKTL: sites send class prototypes only; the server answers with one image and one latent vector per class."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, normalize

from heterosync.errors import UserError
from heterosync.methods.answer import Answer
from heterosync.methods.base import COMMON_LEAVES, Method, Partner
from heterosync.models.generator import build_stand_in, fit_stand_in, generator_digest, load_generator, resized
from heterosync.models.prototypes import CLASSES, PrototypeNet, align, class_means, feature_transformer, margin_loss
from heterosync.training import Batch, Examples, Settings, TrainingSettings, setting
from heterosync.training.seeds import seed_of

#: The setting `generator` without a file, and what is said of it in the title.
FALLBACK = "fallback"
#: What the server remembers: the transformer, the rounds so far, and the hash of the generator's file.
TRANSFORMER, ROUND, DIGEST = "transformer.", "round", "generator"
#: Settings by which the pairs are made, beside the generator itself.
_OF_PAIRS = ("lambda_", "server_epochs", "server_lr", "server_batch", "fit_steps")


@dataclass(frozen=True)
class FedKTLSettings(Settings):
    what: ClassVar[str] = "fedktl"

    generator: str = setting(
        FALLBACK, "[R] fitted to the anchor set; else the name of a .pt2 file in the server's torch cache [C] StyleGAN"
    )
    latent: int = setting(64, "[own] of the fallback; with a file, its vectors' length (StyleGAN: 512 [C])", low=1)
    mu: float = setting(50.0, "[C] StyleGAN-XL and StyleGAN3; Stable Diffusion: 100; 0: sites stay alone", low=0.0)
    lambda_: float = setting(0.1, "[C] StyleGAN3; StyleGAN-XL: 1, Stable Diffusion: 0.01", low=0.0)
    scale: float = setting(64.0, "[C] s of the cosines", low=1e-6)
    margin: float = setting(0.5, "[C] m, radians added to the angle of the true class", low=0.0, high=1.5)
    max_norm: float = setting(100.0, "[C] of the gradient", low=1e-6)
    server_epochs: int = setting(100, "[C]", low=1)
    server_lr: float = setting(0.01, "[C] Adam; Stable Diffusion: 0.1", low=1e-12)
    server_batch: int = setting(100, "[C] prototypes, and as many vectors of the generator", low=2)
    fit_steps: int = setting(500, "[own] of the fallback's Adam, on batches of 64 anchor images", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = self.generator
        if name != FALLBACK and (os.path.dirname(name) or not name.endswith(".pt2")):
            raise UserError(
                f"fedktl setting 'generator' is '{name}': {FALLBACK}, or the name (no folder) of a torch.export file, "
                "for example stylegan3.pt2"
            )

    def idle(self) -> dict[str, str]:
        if not self.mu:  # no pairs: the server has nothing to make
            return dict.fromkeys(("generator", *_OF_PAIRS), "mu above 0")
        return {} if self.generator == FALLBACK else {"fit_steps": f"generator={FALLBACK}"}


class FedKTL(Method):
    """Zhang J., Liu, Hua, Cao, "An upload-efficient scheme for transferring knowledge from a server-side pre-trained
    generator to clients in heterogeneous federated learning", CVPR 2024.

        site k:  min  CE(s cos(u, E), margin m on the true class) + mu MSE(P(phi(x_c)), v_c),   u = head(phi(x)) / |.|
                 p_kc <- mean of u over the training images of class c, normalised; that is all it sends
        server:  F <- Adam on  MMD^2(F(p), generator's vectors) + lambda MSE(F(p), q_y),   q_c: mean of F(p_kc) over k
                 v_c <- q_c,   x_c <- generator(v_c):  the pairs of the next round

    phi: the ResNet's body; E: a fixed simplex frame, for two classes two opposite vectors; P: a linear map that starts
    every round from the same values. Both are drawn once, at the server. phi and head never leave. Score:
    (1 + (cos_1 - cos_0) / 2) / 2. F goes on from round to round at the server [R]; a class that no site sends keeps its
    pair. With at most 2 K prototypes of two numbers the MMD is a weak guide, and
    little transfer is to be expected of two classes.

    The generator is an asset that the server's owner provides: `generator` names a torch.export file, whose hash the
    server keeps, and refuses another in the same training. Without one, `fallback`, a deviation [R], named in the
    title: a small variational auto-encoder of 32 pixels, fitted to the public anchor set. The server has no images, so
    every site fits it for itself when the first pairs arrive, from one seed on the same anchor set, whose digest the
    check-in compares; the server needs only its prior, N(0, I), and sends v_c alone. Sites render x_c = generator(v_c):
    the network is alike wherever machines round alike, and a pair is consistent at each site in any case. It is kept
    there, in the resume state. Uploading it once would have cost more than all else that FedKTL sends.

    Further deviations [R]: x_c lie in [0, 1], as all images here, and pass phi together with a batch, so that BatchNorm
    sees no batch of two. The native recipe [C]: of training, SGD at 0.01, one local epoch, batches of 10.

    Sent: up `proto` and `proto_class`, 32 bytes per round; down `etf`, `proj`, `lat`, `img_class` and, with a file,
    `img`. Each site is tested with its own model; there is no model for unseen sites.

    Degenerates: with mu = 0 into local learning with the margin's loss: the server makes no pairs, and nothing of the
    others reaches a site.
    """

    name = "fedktl"
    title = "FedKTL (fallback generator)"
    status = "reconstruction"
    citation = "Zhang J. et al., CVPR 2024, arXiv 2403.15760"
    leaves = (
        "W2: `proto`, the mean direction of the network's answers to the training images of each class, two numbers "
        "per class, and `proto_class`, which classes the site has",
        *COMMON_LEAVES,
    )
    personal = True
    only_updates = False
    Settings = FedKTLSettings
    settings: FedKTLSettings
    _pairs: tuple[Tensor, Tensor] | None = None  # this round's images (c, ...) and vectors (c, latent)

    def __init__(self, settings: FedKTLSettings | None = None, training: TrainingSettings | None = None):
        super().__init__(settings, training)
        self._file = "" if self.settings.generator == FALLBACK else self.settings.generator
        if self._file:
            self.title, self.status = f"FedKTL ({self._file})", "code-faithful"  # type: ignore[misc]

    @property
    def needs_anchor(self) -> bool:
        return not self._file and self.settings.mu > 0

    def network(self, weights: str) -> nn.Module:
        t = self.training
        model = PrototypeNet(t.backbone, t.channels, t.image_size, self.settings.latent, weights)
        if not self._file:
            model.generator = build_stand_in(t.channels, self.settings.latent)
            model.register_buffer("fitted", torch.zeros((), dtype=torch.int64))
        return model

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        return ("etf", "proj.weight", "proj.bias", "lat", "img_class", *(("img",) if self._file else ()))

    def returned_names(self, model: nn.Module) -> tuple[str, ...]:
        return ("proto", "proto_class")

    # -- at a site -----------------------------------------------------------------------------------------------------

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        known = model.img_class.bool()
        self._pairs = None
        if not known.any():
            return
        if not self._file:
            self._render(model, examples)
        self._pairs = model.img[known].clone(), model.lat[known].clone()

    def _render(self, model: nn.Module, examples: Examples) -> None:
        """The fallback's images of the received vectors."""
        if not model.fitted:
            images = torch.cat([batch.images for batch in examples.anchor(self.training.batch_size)])
            fit_stand_in(model.generator, images, self.settings.fit_steps, seed_of(self.training.seed, "generator"))
            model.fitted.fill_(1)
        with torch.no_grad():
            model.img.copy_(resized(model.generator.decode_forward(model.lat), self.training.image_size))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        s, labels = self.settings, batch.labels.long()
        if self._pairs is None:
            return margin_loss(model.cosines(model.body(batch.images)), labels, s.scale, s.margin)
        images, vectors = self._pairs
        found = model.body(torch.cat([batch.images, images]))
        own, shown = found[: len(labels)], found[len(labels) :]
        transfer = mse_loss(model.proj(shown), vectors)
        return margin_loss(model.cosines(own), labels, s.scale, s.margin) + s.mu * transfer

    def correct_gradients(self, model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), self.settings.max_norm)

    def round_end(self, model: nn.Module, examples: Examples) -> None:
        directions, labels = [], []
        training = model.training
        model.eval()
        with torch.no_grad():
            for batch in examples.training(self.training.batch_size):
                directions.append(model.direction(model.body(batch.images)))
                labels.append(batch.labels.long())
            found = torch.cat(labels)
            model.proto.copy_(normalize(class_means(torch.cat(directions), found, CLASSES)))
            model.proto_class.copy_(torch.bincount(found, minlength=CLASSES) > 0)
        model.train(training)

    def predict(self, model: nn.Module, images: Tensor, partner: Partner) -> Tensor:
        return model(images)

    # -- at the server -------------------------------------------------------------------------------------------------

    def server_memory(self, sites: tuple[str, ...]) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.training.seed, "transformer"))
            state = feature_transformer(CLASSES, self.settings.latent).state_dict()
        memory = {TRANSFORMER + name: value for name, value in state.items()}
        memory[ROUND] = torch.zeros((), dtype=torch.int64)
        if self._file:
            length = load_generator(self._file).latents.shape[1]
            if length != self.settings.latent:
                raise UserError(
                    f"fedktl setting 'latent' is {self.settings.latent}, but the vectors of {self._file} have {length} "
                    f"entries: set it to {length}"
                )
            memory[DIGEST] = generator_digest(self._file)
        return memory

    def fuse(
        self, sent: Mapping[str, Tensor], answers: Mapping[str, Answer], memory: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        s, round_ = self.settings, int(memory[ROUND])
        memory[ROUND] = torch.tensor(round_ + 1)
        if not s.mu:
            return dict(sent)
        kinds = {site: answer["proto_class"].nonzero().flatten() for site, answer in answers.items()}
        labels = torch.cat(list(kinds.values()))
        prototypes = torch.cat([answer["proto"][kinds[site]] for site, answer in answers.items()])
        if len(prototypes) < 2:  # too few for the transformer's BatchNorm
            return dict(sent)
        draw = torch.Generator().manual_seed(seed_of(self.training.seed, "prototypes", round_))
        transformer = feature_transformer(CLASSES, s.latent)
        transformer.load_state_dict({name: memory[TRANSFORMER + name] for name in transformer.state_dict()})

        def home(count: int) -> Tensor:
            if not self._file:
                return torch.randn(count, s.latent, generator=draw)
            latents = load_generator(self._file).latents
            return latents[torch.randint(len(latents), (count,), generator=draw)]

        options = (s.lambda_, s.server_epochs, s.server_lr, s.server_batch)
        centres, _ = align(transformer, prototypes, labels, home, *options, draw)
        memory.update({TRANSFORMER + name: value.detach() for name, value in transformer.state_dict().items()})
        return self._with_pairs(dict(sent), labels.unique(), centres, memory)

    def _with_pairs(
        self, state: dict[str, Tensor], classes: Tensor, centres: Tensor, memory: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The state with new pairs of these classes."""
        state["lat"], state["img_class"] = state["lat"].clone(), state["img_class"].clone()
        state["lat"][classes], state["img_class"][classes] = centres[classes], 1
        if self._file:
            if not torch.equal(memory[DIGEST], generator_digest(self._file)):
                raise UserError(
                    f"generator file {self._file} is another than at the start of this training: put that one back"
                )
            size = self.training.image_size, self.training.channels
            state["img"] = state["img"].clone()
            state["img"][classes] = load_generator(self._file).render(centres[classes], *size)
        return state
