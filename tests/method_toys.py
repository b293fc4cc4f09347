"""What runs of methods in one process leave behind, for tests that compare them."""

from __future__ import annotations

import torch
from torch import Tensor

from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import RunSummary


def last(summary: RunSummary) -> dict[str, Tensor]:
    """The global state at the end of a run."""
    return load_model(summary.folder / "last_model.pt").state


def own(summary: RunSummary, site: str = "site-a") -> dict[str, Tensor]:
    """A site's whole state at the end of its last round."""
    return torch.load(summary.folder / "sites" / site / "state.pt", weights_only=True)["state"]


def same(one: dict[str, Tensor], other: dict[str, Tensor], prefix: str = "net.") -> bool:
    """Whether the tensors of `other` below `prefix` are those of `one`, bit for bit."""
    names = [name for name in other if name.startswith(prefix)]
    assert names
    return all(torch.equal(one[name], other[name]) for name in names)
