"""The swarm: sites that fuse among themselves arrive where the server's fusion does, and the server sees no weights."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from heterosync.federation.modelfile import load_model
from heterosync.federation.runner import run_inprocess
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running.simulator import SimulationFailed, SimulationResult, simulate
from toys import SMOKE, toy_alliance, toy_site

pytestmark = pytest.mark.flare

TRAINING = {**SMOKE, "rounds": 3}
LIMIT = 300.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return toy_alliance(tmp_path_factory.mktemp("swarm") / "data", 3)


@pytest.fixture(scope="module")
def run(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> SimulationResult:
    root = tmp_path_factory.mktemp("run")
    job = build_job("hsl", root / "job", JobOptions(training=TRAINING, topology="swarm"))
    return simulate(job, root / "ws", list(data), next(iter(data.values())).parent, timeout=LIMIT)


@pytest.fixture(scope="module")
def oracle(data: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("oracle") / "run"
    run_inprocess("hsl", data, out, training=TRAINING)
    return out


def history(folder: Path) -> list[list[str]]:
    with (folder / "history.csv").open(newline="") as file:
        return sorted(row for row in csv.reader(file) if row[2] != "seconds")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last_model.pt", "best_model.pt"])
def test_every_site_holds_the_models_of_the_in_process_run(run: SimulationResult, oracle: Path, name: str) -> None:
    theirs = load_model(oracle / name)
    for site, folder in run.sites.items():
        ours = load_model(folder / name)
        assert (ours.round, ours.labels, ours.training) == (theirs.round, theirs.labels, theirs.training), site
        assert list(ours.state) == list(theirs.state)
        for key, value in theirs.state.items():
            torch.testing.assert_close(ours.state[key], value, rtol=1e-6, atol=1e-7, msg=f"{site}: {key}")


@pytest.mark.slow
def test_the_server_has_the_record_and_no_weights(run: SimulationResult, oracle: Path) -> None:
    assert run.status == "completed"
    server = run.log.parent / "server"
    assert not [p for p in server.rglob("*") if p.is_file() and p.stat().st_size > 2**20]
    assert not list(server.rglob("*.pt")) and not list(run.results.glob("*.pt"))
    cross, theirs = (json.loads((f / "cross_site_metrics.json").read_text()) for f in (run.results, oracle))
    assert cross == theirs
    assert history(run.results) == history(oracle)
    record = json.loads((run.results / "run.json").read_text())
    expected = json.loads((oracle / "run.json").read_text())
    assert record["topology"] == "swarm" and record["best_round"] == expected["best_round"]
    assert [r["contributors"] for r in record["rounds"]] == [sorted(run.sites)] * 3
    assert record["anchor_digest"] == expected["anchor_digest"] and sorted(record["check_in"]) == sorted(run.sites)


@pytest.mark.slow
def test_what_went_from_site_to_site_is_on_record_and_on_the_list(run: SimulationResult) -> None:
    sent: list[tuple[int, str]] = []
    for site, folder in run.sites.items():
        records = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
        assert all(record["left"] for record in records)
        assert {r["task"] for r in records if r.get("to") != "sites"} >= {"check_in", "report", "validate"}
        for record in records:
            tensors = [item for item in record["items"] if item["shape"]]
            assert bool(tensors) == (record.get("to") == "sites"), record["task"]
        reports = [r for r in records if r["task"] == "swarm_report_learn_result" and r.get("to") == "sites"]
        sent += [(record["round"], site) for record in reports]
        assert not list(folder.glob("global-*.pt")), f"{site} keeps candidates"
    for round_ in range(3):  # all but the one that fuses
        assert len({site for number, site in sent if number == round_}) == 2
    assert len(sent) == 3 * 2


@pytest.mark.slow
def test_swarm_learning_is_federated_averaging_without_weights_at_the_server(tmp_path: Path) -> None:
    """By the number of training images, 24 and 12."""
    sites = {"site-a": toy_site(tmp_path / "data/site-a"), "site-b": toy_site(tmp_path / "data/site-b", (10, 10), 1)}
    training = {**SMOKE, "rounds": 1}
    job = build_job("swarm", tmp_path / "job", JobOptions(training=training, in_process=True))
    done = simulate(job, tmp_path / "ws", list(sites), tmp_path / "data", timeout=LIMIT, log=None)
    run_inprocess("fedavg", sites, tmp_path / "oracle", training=training)
    theirs = load_model(tmp_path / "oracle" / "last_model.pt").state
    for folder in done.sites.values():
        ours = load_model(folder / "last_model.pt").state
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    server = tmp_path / "ws" / "server"
    assert server.is_dir() and not list(server.rglob("*.pt"))
    assert not [p for p in server.rglob("*") if p.is_file() and p.stat().st_size > 2**20]


@pytest.mark.slow
def test_sites_that_differ_stop_at_the_check_in(data: dict[str, Path], tmp_path: Path) -> None:
    for number, name in enumerate(("site-a", "site-b", "site-c")):
        toy_site(tmp_path / "data" / name, seed=number, anchor_seed=7 if name == "site-c" else 99)
    job = build_job("hsl", tmp_path / "job", JobOptions(training=TRAINING, topology="swarm", in_process=True))
    with pytest.raises(SimulationFailed, match="site-c: its anchor digest"):
        simulate(job, tmp_path / "ws", ["site-a", "site-b", "site-c"], tmp_path / "data", timeout=LIMIT, log=None)
