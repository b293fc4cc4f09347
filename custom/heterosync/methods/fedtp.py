"""FedTP: a hyper-network at the server gives every site its own self-attention; the rest of a ViT is averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from heterosync.errors import UserError
from heterosync.methods.answer import Answer, mean
from heterosync.methods.base import COMMON_LEAVES, Method, SampleWeights
from heterosync.models.vit import HyperNetwork, ViT, qkv_names
from heterosync.training import TrainingSettings, setting
from heterosync.training.seeds import seed_of

#: What the server remembers, by prefix: the hyper-network, one embedding per site, the momentum of both.
HYPER, EMBEDDING, MOMENTUM = "hyper.", "embedding.", "momentum."


@dataclass(frozen=True)
class FedTPSettings(SampleWeights):
    what: ClassVar[str] = "fedtp"

    patch: int = setting(16, "[R] at 224 px; the code has 4 at 32 px [C]; pixels per side", low=1)
    dim: int = setting(128, "[C] width of a token", low=1)
    depth: int = setting(6, "[C] layers", low=1)
    heads: int = setting(8, "[C]", low=1)
    dim_head: int = setting(64, "[C]", low=1)
    mlp: int = setting(256, "[C]", low=1)
    dropout: float = setting(0.1, "[C]", low=0.0, high=0.99)
    embed: int = setting(128, "[C] width of a site's embedding", low=1)
    hyper_hidden: int = setting(150, "[C]", low=1)
    hyper_layers: int = setting(3, "[C] hidden layers of the hyper-network", low=0)
    hyper_lr: float = setting(0.01, "[C] SGD, one step per round; 0: frozen", low=0.0)
    hyper_momentum: float = setting(0.9, "[C]", low=0.0, high=0.999)
    hyper_decay: float = setting(1e-3, "[C] weight decay of hyper-network and embeddings", low=0.0)

    def idle(self) -> dict[str, str]:
        return {} if self.hyper_lr else dict.fromkeys(("hyper_momentum", "hyper_decay"), "hyper_lr above 0")


class FedTP(Method):
    """Li H., Cai, Wang, Tang, Ding, Lin, Shi, "FedTP: federated learning by transformer personalization", IEEE TNNLS
    35, 2024.

        to site k:  w, q_k = h(e_k; phi)      site k:  w_k, q'_k <- local epochs of BCE from w, q_k, all weights trained
        server:     w <- sum_k (n_k / n) w_k,   g = sum_k (n_k / n) J_k^T (q_k - q'_k),   J_k = dh(e_k; phi) / d(e, phi)
                    (e, phi) <- one step of SGD with momentum and weight decay by g

    q_k: the query, key and value matrices of every layer of a small ViT; w: all else. h and the embeddings e_k stay at
    the server, with their momentum, from round to round: 178 million weights at the defaults (0.7 GB, as much again for
    the momentum, and both in every stored global model). It grows with depth, heads, dim_head and the square of dim.

    The ViT is the official one with larger patches [R], without pretrained weights: on fewer than 10 000 images it is
    weak. Officially a tenth of the sites takes part in a round, here all. Each site is tested with its own model;
    unseen sites have no embedding, hence none; one that joins a chain of jobs gets a new one. The mean of the q'_k,
    which takes their place in the stored global state, is never used. The native recipe: of training, SGD at 0.01 with
    weight decay 1e-5 and batches of 64 [C].

    Sent: all tensors of the ViT, 8.0 MiB per round at 224 px (7.9 MiB at 32 px), in each direction; a site keeps
    nothing. The server sees which site has which q_k.

    Degenerates: with hyper_lr = 0 and one embedding for all into FedAvg on all but q, which starts every round anew.
    """

    name = "fedtp"
    title = "FedTP"
    status = "code-faithful"
    citation = "Li H. et al., IEEE TNNLS 35, 2024, arXiv 2211.01572"
    leaves = ("W1: all tensors of the ViT, the site's own query, key and value matrices too", *COMMON_LEAVES)
    personal = True
    unheeded = ("backbone",)
    memory_by_site = (EMBEDDING, MOMENTUM + EMBEDDING)
    Settings = FedTPSettings
    settings: FedTPSettings

    def __init__(self, settings: FedTPSettings | None = None, training: TrainingSettings | None = None):
        super().__init__(settings, training)
        self._qkv = qkv_names(self.settings.depth)
        side, patch = self.training.image_size, self.settings.patch
        if side % patch:
            raise UserError(f"fedtp setting 'patch' is {patch}, which does not divide image_size {side}: change one")
        if self.training.weights not in ("auto", "none"):
            raise UserError(
                f"training setting 'weights' is '{self.training.weights}', but fedtp trains a ViT from scratch: "
                "set it to none"
            )

    @classmethod
    def first_weights(cls, training: TrainingSettings) -> str:
        return "none"

    def in_words(self) -> str:
        return f"a ViT of {self.settings.depth} layers of width {self.settings.dim} at {self.training.image_size} px"

    def network(self, weights: str) -> nn.Module:
        s, t = self.settings, self.training
        return ViT(t.image_size, t.channels, s.patch, s.dim, s.depth, s.heads, s.dim_head, s.mlp, s.dropout)

    # -- at the server -------------------------------------------------------------------------------------------------

    def server_memory(self, sites: tuple[str, ...]) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.training.seed, "hyper-network"))
            trained = {HYPER + name: value for name, value in self._hyper().state_dict().items()}
            trained |= {EMBEDDING + site: torch.randn(self.settings.embed) for site in sites}
        return {**trained, **{MOMENTUM + name: torch.zeros_like(value) for name, value in trained.items()}}

    def for_site(self, state: Mapping[str, Tensor], memory: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
        with torch.no_grad():
            return {**state, **self._generated(memory, site)}

    def fuse(
        self, sent: Mapping[str, Tensor], answers: Mapping[str, Answer], memory: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        s = self.settings
        trained = {name: value.detach().requires_grad_() for name, value in memory.items() if MOMENTUM + name in memory}
        optimizer = torch.optim.SGD(trained.values(), s.hyper_lr, s.hyper_momentum, weight_decay=s.hyper_decay)
        for name, value in trained.items():  # the tensors are those of `memory`, which the step below changes
            value.grad = torch.zeros_like(value)  # an embedding of an absent site decays too, as in one table
            optimizer.state[value]["momentum_buffer"] = memory[MOMENTUM + name]
        for site, answer in answers.items():
            given = self._generated(trained, site)
            moved = [answer.weight * (value.detach() - answer[name]) for name, value in given.items()]
            torch.autograd.backward(list(given.values()), moved)
        optimizer.step()
        return {name: mean(answers, name) for name in sent}

    def _hyper(self) -> HyperNetwork:
        s = self.settings
        return HyperNetwork(s.depth, 3 * s.heads * s.dim_head, s.dim, s.embed, s.hyper_hidden, s.hyper_layers)

    def _generated(self, memory: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
        """q_k of one site, by the names of the ViT's state."""
        with torch.device("meta"):  # only the form: the weights are those of `memory`
            hyper = self._hyper()
        weights = {name: memory[HYPER + name] for name in hyper.state_dict()}
        return dict(zip(self._qkv, functional_call(hyper, weights, (memory[EMBEDDING + site],)), strict=True))
