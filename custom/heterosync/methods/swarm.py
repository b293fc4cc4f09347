"""Swarm learning: federated averaging whose merge goes round among the sites (Warnat-Herresthal et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heterosync.methods.base import COMMON_LEAVES, Method, SampleWeights


@dataclass(frozen=True)
class SwarmSettings(SampleWeights):
    what: ClassVar[str] = "swarm"


class Swarm(Method):
    """Warnat-Herresthal et al., "Swarm learning for decentralized and confidential clinical machine learning", Nature
    594, 265-270 (2021).

        site k:  w_k <- local epochs of BCE from w        the round's leader, a site:  w <- sum_k (n_k / n) w_k

    Learning is federated averaging; only who merges differs: a site that is drawn for every round, so that no fixed
    party sees the weights of all (flare/swarm_site.py). In the original a permissioned ledger admits the sites and
    elects the leader; here FLARE's check-in and controller do, and there is no ledger. Within one process, where nobody
    sends anything, it is FedAvg. Sent: as FedAvg, 42.7 MiB per round with ResNet18 from site to site, and never to the
    server; the leader sends the merged model to all.

    Degenerates: into FedAvg with the same `weighting`, to the last bit.
    """

    name = "swarm"
    title = "Swarm learning"
    status = "reconstruction"
    citation = "Warnat-Herresthal et al., Nature 594, 265 (2021), without its ledger"
    leaves = (
        "W1: all tensors of the classifier (weights, BatchNorm statistics and counters), to other sites only",
        "the scalars of a round below: to the site that leads it, with the weights, and to the server",
        *COMMON_LEAVES,
    )
    topology = "swarm"
    Settings = SwarmSettings
