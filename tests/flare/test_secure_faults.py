"""Faults in the middle of a job, on one provisioned alliance of three sites with mutual TLS."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from federation_toys import (
    JOB_PROCESS,
    SERVER,
    TRAINER,
    Federation,
    contributors,
    federation,
    job_of,
    model_digest,
    oracle,
)
from heterosync.flare.running.processes import package_environment
from heterosync.flare.running.session import COMPLETED
from toys import SMOKE

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.secure]

ALL, TWO = ["site-a", "site-b", "site-c"], ["site-a", "site-b"]
LONG = {**SMOKE, "local_epochs": 25, "patience": 25}  # rounds long enough for a fault in the middle
FAULTY = Path(__file__).parents[1] / "faulty_site"


@pytest.fixture(scope="module")
def everybody(root: Path, data: dict[str, Path]) -> Iterator[Federation]:
    with federation(root / "alliance", data) as running:
        yield running


def test_a_killed_trainer_costs_no_round(everybody, root, data):
    killed: list[int] = []

    def kill_once(job_id: str) -> None:
        log = everybody.run_folder("site-b", job_id) / "log.txt"
        if not killed and log.exists() and "round 1/2, epoch " in log.read_text():
            killed.append(everybody.kill("site-b", TRAINER))

    done = everybody.run(job_of(root, "trainer", LONG, in_process=False), look=kill_once)
    assert killed == [1]
    assert "it starts again" in (everybody.run_folder("site-b", done.end.job_id) / "log.txt").read_text()
    assert done.end.status == COMPLETED and contributors(done) == [ALL] * 2
    assert model_digest(done.folder / "last_model.pt") == oracle(root, data, LONG)


def test_a_slow_site_is_not_waited_for_longer_than_the_job_says(everybody, root):
    """site-c's trainer is stopped in round 1 for as long as the round lasts; it is back in the next."""
    stopped: list[psutil.Process] = []

    def stop_once(job_id: str) -> None:
        log = everybody.run_folder("site-c", job_id) / "log.txt"
        if not stopped and log.exists() and "round 1/3, epoch " in log.read_text():
            stopped.extend(everybody.processes("site-c", TRAINER))
            for process in stopped:
                process.suspend()
        record = everybody.run_folder(SERVER, job_id) / "run.json"
        if stopped and record.exists() and json.loads(record.read_text())["rounds"]:
            for process in stopped:
                if process.is_running() and process.status() == psutil.STATUS_STOPPED:
                    process.resume()

    training = {**LONG, "rounds": 3}
    done = everybody.run(
        job_of(root, "slow", training, in_process=False, min_clients=2, wait_after_min=6), look=stop_once
    )
    assert stopped and done.end.status == COMPLETED
    assert contributors(done)[0] == TWO


def test_bad_answers_of_a_site_are_refused_by_name_and_the_others_go_on(everybody, root):
    faults = {
        "nan": "not finite",
        "shape": "has shape",
        "missing": "is missing",
        "junk": "'junk' is not part of the shared state",
        "old round": "it is of round 3, this is round 4",
        "text": "'patient' is not on the list",
    }
    told = {str(round_): fault for round_, fault in enumerate(faults)}
    paths = os.pathsep.join([str(FAULTY), package_environment()["PYTHONPATH"]])
    everybody.restart("site-c", PYTHONPATH=paths, TOY_FAULTS=json.dumps(told))
    try:
        training = {**SMOKE, "rounds": len(faults) + 1}
        done = everybody.run(job_of(root, "faulty", training, min_clients=2, wait_after_min=5))
    finally:
        everybody.restart("site-c")
    assert done.end.status == COMPLETED
    records = done.record()["rounds"]
    assert contributors(done) == [TWO] * len(faults) + [ALL]
    for record, (fault, reason) in zip(records, faults.items(), strict=False):
        assert list(record["refused"]) == ["site-c"] and reason in record["refused"]["site-c"], fault


def test_a_killed_job_process_of_a_site_ends_the_job_with_the_last_model_kept(everybody, root):
    killed: list[int] = []

    def kill_once(job_id: str) -> None:
        record = everybody.run_folder(SERVER, job_id) / "run.json"
        if not killed and record.exists() and json.loads(record.read_text())["rounds"]:
            killed.append(everybody.kill("site-c", JOB_PROCESS))

    training = {**LONG, "rounds": 20}
    done = everybody.run(job_of(root, "job-process", training, min_clients=2), look=kill_once)
    assert killed and done.end.status == "FINISHED:EXECUTION_EXCEPTION"
    assert "the models of the rounds that were done are kept" in done.end.cause
    assert (done.folder / "last_model.pt").exists()
    assert done.record()["rounds"]


def test_a_killed_site_is_missed_while_the_others_go_on_and_is_back_for_the_next_job(everybody, root):
    killed: list[int] = []

    def kill_once(job_id: str) -> None:
        record = everybody.run_folder(SERVER, job_id) / "run.json"
        if not killed and record.exists() and json.loads(record.read_text())["rounds"]:
            killed.append(everybody.kill("site-c"))
            everybody.start("site-c")

    training = {**LONG, "rounds": 3}
    done = everybody.run(job_of(root, "parent", training, min_clients=2, wait_after_min=5), look=kill_once)
    assert killed and contributors(done)[-1] == TWO
    assert done.end.status == "FINISHED:ABNORMAL" and done.record()["status"] == "completed"
    assert (done.folder / "last_model.pt").exists()
    again = everybody.run(job_of(root, "after", min_clients=2))
    assert again.end.status == COMPLETED and contributors(again) == [ALL] * 2
