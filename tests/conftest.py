"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from toys import SMOKE, toy_alliance

# Small models gain nothing from many threads, and a federation is many processes.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Federations first: the short tests then fill what time the last of them leaves."""
    items.sort(key=lambda item: item.get_closest_marker("flare") is None)


def pytest_collection_finish() -> None:
    """What importing everything left is not looked at by every later collection of garbage: the server of a federation
    makes one per message, which costs more than a toy round."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture
def smoke() -> dict:
    return dict(SMOKE)


@pytest.fixture(scope="session")
def alliance(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three toy sites, shared by the tests that only read them."""
    return toy_alliance(tmp_path_factory.mktemp("alliance"), 3)
