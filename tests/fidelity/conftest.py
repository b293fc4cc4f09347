"""Fixtures of the fidelity tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from toys import toy_site


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sites of different sizes: 36 and 18 training images."""
    folder = tmp_path_factory.mktemp("two")
    return {
        "site-a": toy_site(folder / "a", (30, 30), seed=0, signal=155),
        "site-b": toy_site(folder / "b", (15, 15), seed=1, signal=155),
    }
