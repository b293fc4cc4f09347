"""What the tests of running federations share."""

from __future__ import annotations

from pathlib import Path

import pytest

from toys import toy_alliance


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for one module's federation."""
    return tmp_path_factory.mktemp("federation")


@pytest.fixture(scope="module")
def data(root: Path) -> dict[str, Path]:
    """Three toy sites in it."""
    return toy_alliance(root / "data", 3)
