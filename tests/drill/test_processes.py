"""A simulation with fewer threads than sites: FLARE starts a new process for every task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from federation_toys import model_digest
from heterosync.federation.runner import run_inprocess
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running.simulator import simulate
from toys import SMOKE

pytestmark = [pytest.mark.drill, pytest.mark.flare]


def test_what_a_site_remembers_is_there_for_its_next_process(data: dict[str, Path], tmp_path: Path, tell: Callable):
    """a new process for every task of a simulation, with tensors that stay at the sites (`fedbn`)"""
    two = {site: data[site] for site in ("site-a", "site-b")}
    job = build_job("fedbn", tmp_path / "job", JobOptions(training=SMOKE, in_process=True))
    done = simulate(job, tmp_path / "ws", list(two), data["site-a"].parent, timeout=600, log=None, threads=1)
    run_inprocess("fedbn", two, tmp_path / "oracle", training=SMOKE)
    for name in ("last_model.pt", "best_model.pt"):
        assert model_digest(done.results / name) == model_digest(tmp_path / "oracle" / name), name
    tell("both models are those of one process, tensor for tensor")
