"""Segmentation in FLARE's simulator: equal to the in-process run tensor by tensor, and told in Dice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from heterosync.federation.modelfile import load_model
from heterosync.federation.results import read_history
from heterosync.federation.runner import run_inprocess
from heterosync.flare.jobs.builder import JobOptions, build_job
from heterosync.flare.running.simulator import simulate
from segment_toys import TINY, receiving, toy_volume_alliance

pytestmark = [pytest.mark.flare, pytest.mark.slow]

TRAINING = {**TINY, "rounds": 2, "augment": True}


def test_a_simulated_segmentation_equals_the_inprocess_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sites = {**toy_volume_alliance(tmp_path / "data", 2), "outside": receiving(tmp_path / "data" / "outside")}
    job = build_job("prostate_ahnet", tmp_path / "job", JobOptions(training=TRAINING, in_process=True))
    done = simulate(job, tmp_path / "ws", list(sites), tmp_path / "data", log=None, timeout=400).results
    oracle = run_inprocess("prostate_ahnet", sites, tmp_path / "oracle", training=TRAINING).folder
    for name in ("last_model.pt", "best_model.pt"):
        mine, theirs = load_model(done / name), load_model(oracle / name)
        assert mine.round == theirs.round and set(mine.state) == set(theirs.state)
        assert all(torch.equal(mine.state[key], theirs.state[key]) for key in theirs.state)
    rows = [sorted(row for row in read_history(run) if row[2] != "seconds") for run in (done, oracle)]
    assert rows[0] == rows[1] and {row[2] for row in rows[0]} >= {"val_dice_received", "val_dice_best"}
    assert json.loads((done / "cross_site_metrics.json").read_text()) == json.loads(
        (oracle / "cross_site_metrics.json").read_text()
    )
    run = json.loads((done / "run.json").read_text())
    assert run["receivers"] == ["outside"] and [r["contributors"] for r in run["rounds"]] == [["site-a", "site-b"]] * 2
    kept = {site: list((tmp_path / "ws").rglob(f"{site}/**/heterosync/results/*_model.pt")) for site in sites}
    assert [len(kept[site]) for site in sorted(sites)] == [2, 0, 0]
    for file in kept["outside"]:  # what only a receiver keeps: the server's own file
        mine, theirs = load_model(file), load_model(oracle / file.name)
        assert mine.round == theirs.round and all(torch.equal(mine.state[k], v) for k, v in theirs.state.items())
