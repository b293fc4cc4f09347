"""A method that uses every part of the interface, for tests in one process and in FLARE's."""

from __future__ import annotations

import torch

from heterosync.methods.answer import mean
from heterosync.methods.base import COMMON_LEAVES, SCALAR_LEAVES, Method


class Everything(Method):
    """`net.*` both ways, `turn`, `gift` and `told` only down, `seen` only up; in each round one site rests.

    seen: (rounds that the site trained, training images and number of the site). turn, gift: what one site is sent: 1
    when it shall rest, and a megabyte of its number. told: the number of rounds, by `fuse`. The server remembers what
    each site has sent.
    """

    name, title, status, citation = "everything", "Everything", "exact", "test"
    leaves = ("W1: all tensors of the classifier", "W0: `seen`", SCALAR_LEAVES["n_epochs"], *COMMON_LEAVES)
    scalars = ("n_epochs",)
    weighting = "samples"
    needs_all = True
    only_updates = False

    def network(self, weights):
        model = super().network(weights)
        model.register_buffer("turn", torch.tensor(-1))
        model.register_buffer("gift", torch.zeros(2**18))
        model.register_buffer("told", torch.tensor(0))
        model.register_buffer("seen", torch.zeros(2))
        return model

    def shared_names(self, model):
        return tuple(name for name in model.state_dict() if name != "seen")

    def returned_names(self, model):
        return tuple(name for name in model.state_dict() if name not in ("turn", "gift", "told"))

    def round_start(self, model, received, examples):
        model.seen[1] = sum(len(batch.labels) for batch in examples.training(5)) + model.gift.mean()

    def trains(self, model):
        return int(model.turn) != 1

    def batches(self, model, examples, round_, epoch):
        yield from examples.batches(round_, epoch)

    def round_end(self, model, examples):
        model.seen[0] += 1

    def diagnostics(self, model, examples):
        return {"n_epochs": float(model.seen[0])}

    # -- at the server -------------------------------------------------------------------------------------------------

    def server_memory(self, sites):
        return {"rounds": torch.tensor(0), "seen": torch.zeros(len(sites), 2)}

    def for_site(self, state, memory, site):
        number = ord(site[-1]) - ord("a")
        gift = torch.full_like(state["gift"], number)
        return {**state, "turn": torch.tensor(int(memory["rounds"] == number)), "gift": gift}

    def fuse(self, sent, answers, memory):
        memory["rounds"] = memory["rounds"] + 1
        memory["seen"] = torch.stack([answer["seen"] for answer in answers.values()])
        noise = torch.Generator().manual_seed(self.training.seed + int(memory["rounds"]))
        state = {name: mean(answers, name) for name in sent if name.startswith("net.")}
        state["net.fc.bias"] = state["net.fc.bias"] + 0.01 * torch.randn(1, generator=noise)
        return {**state, "turn": sent["turn"], "gift": sent["gift"], "told": memory["rounds"].clone()}
