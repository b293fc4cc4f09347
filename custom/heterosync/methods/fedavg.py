"""Federated averaging: train at the sites, average the weights (McMahan et al. 2017, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heterosync.methods.base import COMMON_LEAVES, Method, SampleWeights


@dataclass(frozen=True)
class FedAvgSettings(SampleWeights):
    what: ClassVar[str] = "fedavg"


class FedAvg(Method):
    """McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017.

        site k:  w_k <- local epochs of BCE from w        server:  w <- sum_k (n_k / n) w_k

    Sent: every tensor of the classifier, BatchNorm statistics and counters included (some reference codes leave these
    out), and n_k. 42.7 MiB per round with ResNet18, in each direction.

    Degenerates: with one site into local learning; with `weighting` equal into `no_al`; with one full-batch SGD step
    per round into the same step on the pooled images (BatchNorm aside, whose batches differ).
    """

    name = "fedavg"
    title = "FedAvg"
    status = "exact"
    citation = "McMahan et al., AISTATS 2017, arXiv 1602.05629"
    leaves = ("W1: all tensors of the classifier (weights, BatchNorm statistics and counters)", *COMMON_LEAVES)
    Settings = FedAvgSettings
