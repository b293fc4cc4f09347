"""Fixtures of the fidelity tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heterosync.federation.runner import RunSummary, run_inprocess
from toys import SMOKE, toy_site


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two sites of different sizes: 36 and 18 training images."""
    folder = tmp_path_factory.mktemp("two")
    return {
        "site-a": toy_site(folder / "a", (30, 30), seed=0, signal=155),
        "site-b": toy_site(folder / "b", (15, 15), seed=1, signal=155),
    }


@pytest.fixture(scope="module")
def smoke_run(two: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Runs a method with SMOKE, over `two` or over other sites, and remembers the outcome."""
    done: dict[str, RunSummary] = {}
    base = tmp_path_factory.mktemp("smoke")

    def run(method: str, method_settings: dict | None = None, sites: dict[str, Path] = two, **changes) -> RunSummary:
        key = json.dumps([method, method_settings, sites, changes], sort_keys=True, default=str)
        if key not in done:
            out = base / f"{method}-{len(done)}"
            done[key] = run_inprocess(method, sites, out, method_settings, {**SMOKE, **changes})
        return done[key]

    return run
