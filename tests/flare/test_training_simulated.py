"""Two simulations as segments of one training: equal to one run in one go, tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from heterosync.cli import main
from heterosync.errors import UserError
from heterosync.federation.modelfile import load_model
from heterosync.federation.results import read_history
from heterosync.federation.runner import run_inprocess
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.jobs.segments import segment_job
from heterosync.flare.running.simulator import JOB_ID, simulate
from toys import SMOKE, toy_alliance

pytestmark = [pytest.mark.flare, pytest.mark.slow]

TRAINING = {**SMOKE, "rounds": 4, "schedule_period": 3}


def assert_same(one: Path, other: Path) -> None:
    def history(folder: Path) -> list:
        return sorted(row for row in read_history(folder) if row[2] != "seconds")

    assert history(one) == history(other)
    for name in ("last_model.pt", "best_model.pt"):
        mine, theirs = load_model(one / name), load_model(other / name)
        assert mine.round == theirs.round and mine.versions == theirs.versions
        assert all(torch.equal(mine.state[key], theirs.state[key]) for key in theirs.state)
    assert json.loads((one / "cross_site_metrics.json").read_text()) == json.loads(
        (other / "cross_site_metrics.json").read_text()
    )
    for key in ("best_round", "plateau_round"):
        assert json.loads((one / "run.json").read_text())[key] == json.loads((other / "run.json").read_text())[key]


def test_two_simulations_equal_one_run_and_a_site_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    sites = toy_alliance(tmp_path / "data", 3)
    two = {name: sites[name] for name in ("site-a", "site-b")}
    job = build_job("hsl", tmp_path / "job", JobOptions(training=TRAINING, in_process=True))
    first = ["simulate", str(job), "--data", str(tmp_path / "data"), "--workspace", str(tmp_path / "ws"), "--json"]
    assert main([*first, "--sites", "site-a,site-b", "--segment-rounds", "2"]) == 0
    assert json.loads((tmp_path / "ws/results/run.json").read_text())["status"] == "stopped: end of the segment"

    # the same two sites, in the same workspace, which FLARE empties
    other = segment_job(job, tmp_path / "joined_job", JOB_ID, rounds=3)
    joined = simulate(
        other, tmp_path / "joined", list(sites), tmp_path / "data", log=None, resume=tmp_path / "ws", timeout=300
    )
    assert main([*first, "--sites", "site-a,site-b", "--resume", str(tmp_path / "ws")]) == 0
    run_inprocess("hsl", two, tmp_path / "straight", {}, TRAINING)
    load_model(tmp_path / "ws/results/last_model.pt").build()
    assert_same(tmp_path / "ws/results", tmp_path / "straight")
    assert len(list((tmp_path / "ws/results/tensorboard").iterdir())) == 2  # the curves of both segments

    # a third site joined after two rounds
    run_inprocess("hsl", two, tmp_path / "half", {}, {**TRAINING, "rounds": 2})
    run_inprocess("hsl", sites, tmp_path / "oracle", {}, {**TRAINING, "rounds": 3}, resume=tmp_path / "half")
    assert_same(joined.results, tmp_path / "oracle")
    rounds = json.loads((joined.results / "run.json").read_text())["rounds"]
    assert [r["contributors"] for r in rounds] == [["site-a", "site-b"]] * 2 + [["site-a", "site-b", "site-c"]]


def test_a_simulation_without_a_past_cannot_be_resumed(tmp_path: Path) -> None:
    sites = toy_alliance(tmp_path / "data", 2)
    job = build_job("hsl", tmp_path / "job", JobOptions(training=TRAINING))
    goes_on = segment_job(job, tmp_path / "next", JOB_ID)
    with pytest.raises(UserError, match="a training is not stored in"):
        simulate(goes_on, tmp_path / "ws", list(sites), tmp_path / "data", resume=tmp_path / "ws")
    with pytest.raises(UserError, match="belong together: use --resume"):
        simulate(goes_on, tmp_path / "ws", list(sites), tmp_path / "data")
    assert not (tmp_path / "ws").exists() and not (tmp_path / "ws.trainings").exists()
