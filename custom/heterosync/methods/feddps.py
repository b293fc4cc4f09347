"""FedDpS, in two readings of its name: sites chosen by a determinantal point process, or images chosen uniformly."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor, nn

from heterosync import pulse
from heterosync.errors import UserError
from heterosync.methods.answer import Answer, mean
from heterosync.methods.base import COMMON_LEAVES, Method
from heterosync.models.encoder import features
from heterosync.training import Batch, Examples, Settings, setting
from heterosync.training.seeds import seed_of

#: Subsets of sites whose determinants are worked out before a run is refused.
MAX_SUBSETS = 100_000


@dataclass(frozen=True)
class FedDPSSettings(Settings):
    what: ClassVar[str] = "feddps"

    reading: str = setting("A", "[R] A: choice of sites; B: choice of images", choices=("A", "B"))
    m_select: int = setting(3, "[R] sites that train in a round, of 5; all where there are fewer", low=1)
    total: int = setting(2048, "[R] images that shall take part in a round, at all sites together", low=1)
    epsilon: float = setting(1.0, "[R] of the Laplace noise on the number of images of a site", low=1e-6)

    def idle(self) -> dict[str, str]:
        return {"total": "reading=B", "epsilon": "reading=B"} if self.reading == "A" else {"m_select": "reading=A"}


class FedDPS(Method):
    """Reference 30 of HeteroSync Learning, which nobody could identify: it is called a method of "data sampling and
    selection", and the name is all that is known. Two readings, both reconstructions; neither stands for the original.

        site k:  trains as in FedAvg on images that join the round with probability q_k, each for itself; b_k of them do
        server:  w <- sum_k b_k w_k / sum_k b_k

    Reading A, after FL-DP3S (arXiv 2303.17358): q_k is 1 for m sites and 0 for the others. They are drawn with
    P(C) ~ det(L_C), L = S^T S, S_ij = 1 - d_ij / max d, d_ij = ||f_i - f_j||^2, where f_k is the mean feature of the
    site's training images under the model that it first receives (class W2); where all determinants are 0, uniformly.
    Reading B, after FedSampling (Qi et al., IJCAI 2023): q = min(1, total / n), where n is the sum of the numbers of
    training images, each with Laplace noise of scale 1 / epsilon. (FedSampling's randomised response hides a site's
    size, but says little of n where sites are few.) The noise shows the mechanism and protects nothing: it comes from
    the job's seed, and n_train leaves a site under every method. A site with fewer than 2 images drawn sits out.

    In round 0, when the server knows nothing yet, q_k is 1 everywhere; later only sites that answered in the round
    before are drawn, or count for n. A site that joins a chain of jobs begins as all did in round 0. Whoever does not
    train sends back what it got, with b_k = 0, and still scores the received model. Profile or count are fixed in the
    site's first round.
    Sent: as FedAvg, 42.7 MiB per round with ResNet18, and the profile (A) or count (B) and b_k; q_k only comes down.

    Degenerates: where all sites (A) or all images (B) take part, into FedAvg.
    """

    name = "feddps"
    title = "FedDpS (reconstruction)"
    status = "reconstruction"
    citation = "reference 30 of Hu et al., Nat. Commun. 16, 9416 (2025), not identified: our readings of its name"
    leaves = (
        "W1: all tensors of the classifier (weights, BatchNorm statistics and counters)",
        "W2, reading A: `profile`, the mean feature of the training images, the same in each round",
        "W0, reading B: `count`, the noised number of training images, the same in each round",
        "W0: `joined`, the number of training images that took part in the round",
        *COMMON_LEAVES,
    )
    weighting = "samples"
    only_updates = False
    memory_by_site = ("told.", "rate.")
    one_model = True  # only `rate` differs
    Settings = FedDPSSettings
    settings: FedDPSSettings

    @property
    def _told(self) -> str:
        """The tensor by which the server decides."""
        return "profile" if self.settings.reading == "A" else "count"

    # -- at a site -----------------------------------------------------------------------------------------------------

    def network(self, weights: str) -> nn.Module:
        model = super().network(weights)
        width = model.net.fc.in_features if self.settings.reading == "A" else 1
        model.register_buffer("rate", torch.ones((), dtype=torch.float64))
        model.register_buffer("joined", torch.tensor(0))
        model.register_buffer(self._told, torch.zeros(width))
        return model

    def shared_names(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in model.state_dict() if name not in ("joined", self._told))

    def returned_names(self, model: nn.Module) -> tuple[str, ...]:
        return tuple(name for name in model.state_dict() if name != "rate")

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        model.joined.zero_()
        if self.settings.reading == "A" and not model.profile.any():
            model.profile.copy_(profile(model, examples, self.training.batch_size))

    def trains(self, model: nn.Module) -> bool:
        return bool(model.rate > 0)

    def batches(self, model: nn.Module, examples: Examples, round_: int, epoch: int) -> Iterator[Batch]:
        if epoch == 0:  # the global generator is the site's own for this round
            if self.settings.reading == "B" and not model.count.any():
                noise = torch.empty(2).exponential_(self.settings.epsilon)
                model.count.fill_(examples.count + float(noise[0] - noise[1]))
            self._rows = joining(float(model.rate), examples.count)
            model.joined.fill_(len(self._rows) if len(self._rows) > 1 else 0)
        if model.joined > 0:
            yield from examples.chosen(round_, epoch, self._rows.numpy())

    # -- at the server -------------------------------------------------------------------------------------------------

    def server_memory(self, sites: tuple[str, ...]) -> dict[str, Tensor]:
        if self.settings.reading == "A":
            subsets, m = math.comb(len(sites), self.settings.m_select), self.settings.m_select
            if subsets > MAX_SUBSETS:
                raise UserError(
                    f"feddps setting 'm_select' is {m}: {len(sites)} sites have {subsets} subsets of that size, "
                    f"{MAX_SUBSETS} can be weighed: choose fewer, or reading B"
                )
        told = self.build_model(weights="none").state_dict()[self._told]
        return {
            "round": torch.tensor(0),
            **{f"told.{site}": torch.zeros_like(told) for site in sites},
            **{f"rate.{site}": torch.ones((), dtype=torch.float64) for site in sites},
        }

    def for_site(self, state: Mapping[str, Tensor], memory: Mapping[str, Tensor], site: str) -> dict[str, Tensor]:
        return {**state, "rate": memory.get(f"rate.{site}", state["rate"]).clone()}  # else a site that only receives

    def fuse(
        self, sent: Mapping[str, Tensor], answers: Mapping[str, Answer], memory: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        memory["round"] = memory["round"] + 1
        memory.update({f"told.{site}": answer[self._told] for site, answer in answers.items()})
        told = {name.removeprefix("told."): value for name, value in memory.items() if name.startswith("told.")}
        known = {site: value for site, value in sorted(told.items()) if value.any()}
        here = {site: value for site, value in known.items() if site in answers}
        rule = self._chosen if self.settings.reading == "A" else self._sampled
        rates = rule(here, int(memory["round"])) if here else {}
        if rates:  # who is away is not drawn; back again, it takes part as little as any
            rates |= dict.fromkeys(known.keys() - here.keys(), min(rates.values()))
        memory.update({f"rate.{site}": torch.tensor(rate, dtype=torch.float64) for site, rate in rates.items()})
        joined = {site: float(answer["joined"]) for site, answer in answers.items()}
        trained = {site: answer for site, answer in answers.items() if joined[site]}
        if not trained:
            return dict(sent)
        return {name: sent[name] if name == "rate" else mean(trained, name, joined) for name in sent}

    def _chosen(self, profiles: Mapping[str, Tensor], round_: int) -> dict[str, float]:
        """Reading A: 1 for the sites of the next round. A site without a profile trains, and thereby sends one."""
        weighed = subset_weights(kernel(torch.stack([*profiles.values()])), self.settings.m_select)
        drawn = draw(*weighed, self.training.seed, round_)
        return {site: float(i in drawn) for i, site in enumerate(profiles)}

    def _sampled(self, counts: Mapping[str, Tensor], round_: int) -> dict[str, float]:
        """Reading B: the same probability everywhere."""
        images = max(float(sum(count.sum() for count in counts.values())), 1.0)
        return dict.fromkeys(counts, min(1.0, self.settings.total / images))


def joining(rate: float, count: int) -> Tensor:
    """Which of `count` images take part, each with probability `rate`; nothing is drawn where all of them do."""
    return torch.arange(count) if rate >= 1 else torch.nonzero(torch.rand(count) < rate).flatten()


@torch.no_grad()
def profile(model: nn.Module, examples: Examples, size: int) -> Tensor:
    """The mean of what enters the last layer (d,), over the training images as they are."""
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    for batch in examples.training(size):
        pulse.beat()
        total = total + features(model.net, batch.images).double().sum(0).cpu()
    model.train(was_training)
    return (total / examples.count).float()


def kernel(profiles: Tensor) -> Tensor:
    """L = S^T S in float64 (K, K) of profiles (K, d), with S = 1 where all profiles are the same."""
    f = profiles.double()
    distance = (f[:, None] - f[None]).square().sum(-1)
    similarity = 1 - distance / distance.max().clamp_min(torch.finfo(torch.float64).tiny)
    return similarity.T @ similarity


def subset_weights(kernel: Tensor, m: int) -> tuple[list[tuple[int, ...]], Tensor]:
    """All subsets of m rows (of all rows, where there are fewer), and det(L_C) of each; 1 where every one is 0."""
    subsets = list(combinations(range(len(kernel)), min(m, len(kernel))))
    index = torch.tensor(subsets)
    parts = kernel[index[:, :, None], index[:, None, :]]
    weights = torch.linalg.det(parts)
    bound = parts.diagonal(dim1=1, dim2=2).prod(1)  # Hadamard's, by which rounding is told from a determinant
    weights = torch.where(weights > 1e-12 * bound, weights, 0.0)
    return subsets, weights if weights.any() else torch.ones_like(weights)


def draw(subsets: list[tuple[int, ...]], weights: Tensor, seed: int, round_: int) -> tuple[int, ...]:
    """One of the subsets, with probability in proportion to its weight."""
    generator = torch.Generator().manual_seed(seed_of(seed, "sites", round_))
    return subsets[int(torch.multinomial(weights, 1, generator=generator))]
