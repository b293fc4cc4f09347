"""Swarm learning is federated averaging; where the weights go is tested with FLARE (tests/flare/test_swarm.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.methods import make_method
from toys import SMOKE


@pytest.mark.parametrize("weighting", ["samples", "equal"])
def test_it_is_fedavg_with_the_same_weights(two: dict[str, Path], tmp_path: Path, weighting: str) -> None:
    states = []
    for method in ("swarm", "fedavg"):
        run_inprocess(method, two, tmp_path / method, {"weighting": weighting}, SMOKE)
        states.append(load_model(tmp_path / method / "last_model.pt").state)
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


def test_sites_of_different_sizes_count_by_default() -> None:
    assert make_method("swarm").weighting == make_method("fedavg").weighting == "samples"
    assert make_method("swarm").topology == "swarm"
