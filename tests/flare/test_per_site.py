"""A method that uses every part of the interface, in FLARE's simulator: each site gets and sends its own."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest
import torch

import heterosync.methods as methods
from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running.simulator import simulate
from interface_toys import Everything
from toys import SMOKE, toy_alliance

pytestmark = [pytest.mark.flare, pytest.mark.slow]

TESTS = Path(__file__).resolve().parents[1]


def history(folder: Path) -> list[list[str]]:
    with (folder / "history.csv").open(newline="") as file:
        return sorted(row for row in csv.reader(file) if row[2] != "seconds")


def test_every_site_gets_and_sends_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "METHODS", (*methods.METHODS, Everything))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS / "toy_method", TESTS))))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sites = toy_alliance(tmp_path / "data", 2, (12, 8))
    job = build_job("everything", tmp_path / "job", JobOptions(training=SMOKE, in_process=True))
    done = simulate(job, tmp_path / "ws", list(sites), tmp_path / "data", timeout=300, log=lambda line: None)
    run_inprocess("everything", sites, tmp_path / "run", training=SMOKE)
    for name in ("last_model.pt", "best_model.pt"):
        ours, theirs = load_model(done.results / name), load_model(tmp_path / "run" / name)
        assert ours.assets["server.seen"].tolist() == theirs.assets["server.seen"].tolist()
        assert list(ours.state) == list(theirs.state)
        assert all(torch.equal(ours.state[key], value) for key, value in theirs.state.items())
    assert ours.assets["server.seen"].tolist()[1][1] == 13.0  # site-b had its own gift of 1 MiB
    assert history(done.results) == history(tmp_path / "run")
    scores = [
        json.loads((folder / "cross_site_metrics.json").read_text()) for folder in (done.results, tmp_path / "run")
    ]
    assert scores[0] == scores[1]
    for folder in done.sites.values():
        lines = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
        sent = [{item["name"] for item in line["items"]} for line in lines if line["task"] == "train"]
        assert len(sent) == 2 and all("seen" in names and not names & {"turn", "gift", "told"} for names in sent)
        assert all(line["left"] for line in lines)
