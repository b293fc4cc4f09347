"""No-AL: HSL without its auxiliary architecture (paper, Ablation)."""

from __future__ import annotations

from heterosync.methods.base import COMMON_LEAVES, Method


class NoAL(Method):
    """Hu et al. 2025, ablation: no second branch, no experts, and so no role for the anchor task.

        site k:  w_k <- local epochs of BCE from w        server:  w <- (1/K) sum_k w_k

    Sent: every tensor of a plain ResNet18 (11,177,025 parameters), 42.7 MiB per round. An epoch has n_k items; HSL's
    has max(n_k, anchor): compare with and without `match_steps`. The paper swaps the headings of this and the
    other ablation between two sections; the definitions agree.

    Degenerates: it is FedAvg with `weighting` equal.
    """

    name = "no_al"
    title = "HSL without auxiliary architecture"
    status = "exact"
    citation = "Hu et al., Nat. Commun. 16, 9416 (2025), ablation No-AL"
    leaves = ("W1: all tensors of the classifier (weights, BatchNorm statistics and counters)", *COMMON_LEAVES)
