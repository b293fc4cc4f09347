"""Central learning: one model of all sites' images in one place. No federation, a yardstick."""

from __future__ import annotations

from heterosync.methods.base import COMMON_LEAVES, Method


class Central(Method):
    """The upper reference of every comparison: what could be reached if images were allowed to leave.

        w <- epochs of BCE on the union of the sites' training images, in as many rounds as the others have

    All images and labels lie in one place before the run starts; nothing here moves them. Training and validation split
    are the unions of the sites'; the in-process engine tests the model at every site on that site's own test split. The
    paper does not name its network; plain ResNet18 [R]. As a job it has one client, whose folder holds the sites'
    folders, and whose model goes to the server of that job: 42.7 MiB per round.

    Degenerates: with one site into local learning (each round starts from the round's best snapshot).
    """

    name = "central"
    title = "Central learning"
    status = "exact"
    citation = "standard upper reference; the paper does not name its network, plain ResNet18 is a reconstruction"
    leaves = (
        "before the run, outside this system: all images and labels of all sites, to one place. This is no federation",
        "W1, from that place: all tensors of the classifier (weights, BatchNorm statistics and counters)",
        *COMMON_LEAVES,
    )
    pooled = True
