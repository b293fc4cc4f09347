"""Segmentation in FLARE's POC mode, with trainers of their own: the model of the in-process run, also where it is only
received."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federation_toys import model_digest
from heterosync.federation.runner import run_inprocess
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running.poc import run_poc
from segment_toys import TINY, receiving, toy_volume_alliance

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.poc]

TRAINING = {**TINY, "rounds": 2, "crops": 2}


def test_poc_gives_the_same_model_as_one_process(tmp_path: Path) -> None:
    sites = {**toy_volume_alliance(tmp_path / "data", 2), "outside": receiving(tmp_path / "data" / "outside")}
    job = build_job("prostate_ahnet", tmp_path / "job", JobOptions(training=TRAINING))
    done = run_poc(job, sites, tmp_path / "poc", timeout=400, say=lambda line: None)
    oracle = run_inprocess("prostate_ahnet", sites, tmp_path / "oracle", training=TRAINING).folder
    for name in ("last_model.pt", "best_model.pt"):
        received = done.sites["outside"] / "results" / name
        assert len({model_digest(file) for file in (done.results / name, oracle / name, received)}) == 1
    found = [json.loads((folder / "cross_site_metrics.json").read_text()) for folder in (done.results, oracle)]
    assert found[0] == found[1] and found[0]["best"]["mean"]["sites"] == 2
    assert all((folder / "job" / "audit.jsonl").is_file() for folder in done.sites.values())
