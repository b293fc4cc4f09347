"""Whole jobs in FLARE's simulator: equal to the in-process run tensor by tensor, also when things break."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running.simulator import SimulationFailed, SimulationResult, simulate
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings
from toys import SMOKE, toy_alliance

pytestmark = [pytest.mark.flare, pytest.mark.slow]

TRAINING = {**SMOKE, "local_epochs": 2}
LIMIT = 400.0


@dataclass
class Run:
    """A finished simulation, the lines it showed, and the oracle's folder for the same job."""

    result: SimulationResult
    lines: list[str]
    oracle: Path | None = None

    def record(self, name: str) -> dict:
        return json.loads((self.result.results / name).read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulation")


@pytest.fixture(scope="module")
def data(root: Path) -> dict[str, Path]:
    return toy_alliance(root / "data", 3)


def play(root: Path, name: str, method: str, sites: list[str], options: JobOptions, **more) -> Run:
    job = build_job(method, root / name / "job", options)
    lines: list[str] = []
    data = more.pop("data", root / "data")
    result = simulate(job, root / name / "ws", sites, data, timeout=LIMIT, log=lines.append, **more)
    left = [p for p in psutil.Process().children(recursive=True) if "nvflare" in " ".join(p.cmdline())]
    assert not left, "processes are left behind"
    return Run(result, lines)


def oracle(root: Path, method: str, sites: dict[str, Path]) -> Path:
    out = root / "oracle" / f"{method}-{len(sites)}"
    if not out.exists():
        run_inprocess(method, sites, out, training=TRAINING)
    return out


def assert_equal_to_oracle(run: Run, expected: Path) -> None:
    for name in ("last_model.pt", "best_model.pt"):
        if not (expected / name).exists():
            assert not (run.result.results / name).exists()
            continue
        ours, theirs = load_model(run.result.results / name), load_model(expected / name)
        assert (ours.round, ours.labels, ours.training) == (theirs.round, theirs.labels, theirs.training)
        assert list(ours.state) == list(theirs.state)
        for key, value in theirs.state.items():
            assert torch.equal(ours.state[key], value), f"{name}: {key}"
    assert run.record("cross_site_metrics.json") == json.loads((expected / "cross_site_metrics.json").read_text())
    assert history(run.result.results) == history(expected)


def history(folder: Path) -> list[list[str]]:
    with (folder / "history.csv").open(newline="") as file:
        return sorted(row for row in csv.reader(file) if row[2] != "seconds")


# -- HeteroSync Learning -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hsl(root: Path, data: dict[str, Path]) -> Run:
    run = play(root, "hsl", "hsl", list(data), JobOptions(training=TRAINING, in_process=True))
    run.oracle = oracle(root, "hsl", data)
    return run


def test_hsl_equals_the_in_process_run_tensor_by_tensor(hsl: Run) -> None:
    assert hsl.result.status == "completed"
    assert_equal_to_oracle(hsl, hsl.oracle)


def test_only_declared_tensors_left_the_sites(hsl: Run) -> None:
    method = make_method("hsl", None, TrainingSettings.from_dict(TRAINING))
    state = method.build_model().state_dict()
    declared = {
        (n, tuple(state[n].shape), str(state[n].dtype)[6:]) for n in method.shared_names(state and method.build_model())
    }
    for folder in hsl.result.sites.values():
        records = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
        assert [r["task"] for r in records] == ["check_in", "train", "train", "validate", "validate", "validate"]
        assert [r["round"] for r in records[1:3]] == [0, 1] and all(r["left"] for r in records)
        for record in records:
            tensors = {(i["name"], tuple(i["shape"]), i["dtype"]) for i in record["items"] if i["name"] in state}
            assert tensors == (declared if record["task"] == "train" else set())


def test_predictions_stay_at_the_sites(hsl: Run) -> None:
    for site, folder in hsl.result.sites.items():
        with (folder / "heterosync" / "results" / "predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert {row["model"] for row in rows} == {"best", "last"} and {row["split"] for row in rows} == {"test"}
        name = rows[0]["id"]
        for file in (hsl.result.results.parent / "server").rglob("*"):
            if file.is_file():
                assert name.encode() not in file.read_bytes(), f"{file} quotes an image id of {site}"


def test_the_server_keeps_the_whole_record(hsl: Run) -> None:
    run = hsl.record("run.json")
    assert run["status"] == "completed" and run["engine"] == "flare" and run["sites"] == ["site-a", "site-b", "site-c"]
    assert [r["contributors"] for r in run["rounds"]] == [["site-a", "site-b", "site-c"]] * 2
    assert all(r["refused"] == {} and set(r["bytes"]) == set(run["sites"]) for r in run["rounds"])
    assert run["best_round"] in (1, 2) and len(run["anchor_digest"]) == 64 and run["labels"] == ["normal", "abnormal"]
    assert list((hsl.result.results / "tensorboard").iterdir())
    assert not (hsl.result.results.parent / "server" / "simulate_job" / "contributions").exists()
    text = "\n".join(hsl.lines)
    assert "round 1/2, epoch 1/2" in text and "left" in text and "round 2/2 done" in text


# -- things that go wrong ----------------------------------------------------------------------------------------------


def test_a_flipped_anchor_label_stops_the_job_before_round_0(root: Path, data: dict[str, Path]) -> None:
    """With fewer threads than sites: FLARE starts a new process for every task."""
    for site in data:
        shutil.copytree(data[site], root / "flipped-data" / site, ignore=shutil.ignore_patterns(".heterosync"))
    table = root / "flipped-data" / "site-b" / "anchor" / "anchor.npz"
    with np.load(table) as pack:
        images, labels = pack["images"], pack["labels"].copy()
    labels[[0, -1]] = labels[[-1, 0]]  # still balanced
    np.savez(table, images=images, labels=labels)
    describe = table.with_name("anchor.json")
    fields = json.loads(describe.read_text())
    fields.pop("digest", None)
    describe.write_text(json.dumps(fields))
    with pytest.raises(SimulationFailed) as caught:
        options = JobOptions(training=TRAINING, in_process=True)
        play(root, "flipped", "hsl", list(data), options, data=root / "flipped-data", threads=2)
    assert "site-b" in str(caught.value) and "anchor" in str(caught.value) and "\n" not in str(caught.value)
    record = json.loads((caught.value.result.results / "run.json").read_text())
    assert record["status"].startswith("failed") and "site-b" in record["status"] and record["rounds"] == []


def test_a_site_with_bad_data_is_left_out_when_min_clients_allows(root: Path, data: dict[str, Path]) -> None:
    for site in data:
        shutil.copytree(data[site], root / "broken-data" / site, ignore=shutil.ignore_patterns(".heterosync"))
    manifest = root / "broken-data" / "site-c" / "manifest.csv"
    manifest.write_text(manifest.read_text() + "images/patient-4711.png,normal\n")
    options = JobOptions(training=TRAINING, min_clients=2, in_process=True)
    run = play(root, "broken", "hsl", list(data), options, data=root / "broken-data")
    record = run.record("run.json")
    assert [r["contributors"] for r in record["rounds"]] == [["site-a", "site-b"]] * 2
    assert record["sites"] == ["site-a", "site-b"]  # no site trains without having passed the check-in
    assert "its data or settings need mending" in record["not_checked_in"]["site-c"]
    two = {site: data[site] for site in ("site-a", "site-b")}
    theirs = load_model(oracle(root, "hsl", two) / "last_model.pt").state
    ours = load_model(run.result.results / "last_model.pt").state
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # the whole line is in the site's log; the server's folder does not quote it
    assert "patient-4711" in (run.result.results.parent / "site-c" / "log.txt").read_text()
    for file in (run.result.results.parent / "server").rglob("*"):
        assert not file.is_file() or b"patient-4711" not in file.read_bytes() or file.name == "log.json", file
