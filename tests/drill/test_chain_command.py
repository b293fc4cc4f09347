"""`heterosync alliance run` as the lead types it, while a site or the server's job process is killed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from federation_toys import ADMIN, SERVER, Federation, federation, job_of, model_digest, oracle, until
from heterosync.flare.running.chain import STATE
from heterosync.flare.running.processes import package_environment
from heterosync.flare.running.session import COMPLETED
from toys import SMOKE

pytestmark = [pytest.mark.drill]

ALL, TWO = ["site-a", "site-b", "site-c"], ["site-a", "site-b"]
TRAINING = {**SMOKE, "rounds": 3, "local_epochs": 25, "patience": 25}
SERVER_JOB = "server.runner_process"


@pytest.fixture(scope="module")
def running(tmp_path_factory, data) -> Iterator[Federation]:
    with federation(tmp_path_factory.mktemp("chain") / "alliance", data) as everybody:
        yield everybody


def alliance_run(kit: Path, job: Path, out: Path, look: Callable[[str], None]) -> str:
    """Run the command with segments of one round; what it printed. `look` is called with that again and again."""
    words = ["alliance", "run", str(job), "--kit", str(kit), "--segments-of", "1", "--out", str(out)]
    printed = out.with_name("printed.txt")
    with printed.open("w") as file:
        command = subprocess.Popen(
            [sys.executable, "-u", "-m", "heterosync.cli", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=package_environment(),
        )
    try:
        until(lambda: look(printed.read_text()) or command.poll() is not None, 400, "the command ends")
    finally:
        command.kill()
        command.wait()
    assert command.returncode == 0, printed.read_text()
    return printed.read_text()


def in_segment_2(running: Federation, printed: str) -> bool:
    """Whether site-c trains in the second round, which is the second job."""
    found = re.search(r"segment 2: job (\S+),", printed)
    log = running.run_folder("site-c", found.group(1)) / "log.txt" if found else None
    return log is not None and log.exists() and "round 2/3, epoch 5/" in log.read_text()


def test_a_site_returns(running, tmp_path: Path, tell: Callable[[str], None]) -> None:
    """kill -9 of a site's parent and job in segment 2 of `heterosync alliance run --segments-of 1`, then restart"""
    kept: list[dict] = []

    def own_state() -> dict:
        (file,) = (running.alliance.kits["site-c"] / "trainings").glob("*/state.pt")
        return torch.load(file, weights_only=True)

    def kill_once(printed: str) -> None:
        if not kept and in_segment_2(running, printed):
            running.kill("site-c")
            kept.append(own_state())
            running.start("site-c")

    # each site keeps the moments of its Adam, which no server could give back to it
    job = job_of(tmp_path, "return", {**TRAINING, "keep_moments": True}, min_clients=2, wait_after_min=5)
    printed = alliance_run(running.alliance.kits[ADMIN], job, tmp_path / "out", kill_once)
    state = json.loads((tmp_path / "out" / STATE).read_text())
    record = json.loads((tmp_path / "out" / "results" / "run.json").read_text())
    tell(f"segments: {[segment['status'] for segment in state['segments']]}; run.json: {record['status']}")
    tell(f"contributors per round: {[r['contributors'] for r in record['rounds']]}")
    assert kept and state["done"] and record["status"] == "completed", printed
    assert [r["contributors"] for r in record["rounds"]] == [ALL, TWO, ALL]
    assert [s["cause"] for s in state["segments"] if s["status"] != COMPLETED] != [""]
    before, after = kept[0], own_state()
    assert (before["round"], after["round"]) == (0, 2)
    steps = after["metrics"]["steps"] / len(after["epochs"]) * (after["metrics"]["best_epoch"] + 1)
    assert adam_steps(after) == adam_steps(before) + steps > steps
    told = f"{adam_steps(before)} steps stored after round 1, {adam_steps(after)} after round 3"
    tell(f"the site's own Adam went on: {told}")


def adam_steps(state: dict) -> int:
    return int(state["moments"]["state"][0]["step"])


def test_server_job(running, tmp_path: Path, data, tell: Callable[[str], None]) -> None:
    """kill -9 of the server's job process only, in the second round of `heterosync alliance run`"""
    killed: list[int] = []

    def kill_once(printed: str) -> None:
        if not killed and in_segment_2(running, printed):
            killed.append(running.kill(SERVER, SERVER_JOB))

    job = job_of(tmp_path, "server-job", TRAINING)
    printed = alliance_run(running.alliance.kits[ADMIN], job, tmp_path / "out", kill_once)
    state = json.loads((tmp_path / "out" / STATE).read_text())
    results = tmp_path / "out" / "results"
    record = json.loads((results / "run.json").read_text())
    tell(f"segments: {[segment['status'] for segment in state['segments']]}; run.json: {record['status']}")
    tell(f"the lead reads: {[segment['cause'] for segment in state['segments'] if segment['cause']]}")
    assert killed == [1] and state["done"] and record["status"] == "completed", printed
    assert [s["status"] for s in state["segments"]].count(COMPLETED) == 3
    assert [r["contributors"] for r in record["rounds"]] == [ALL] * 3
    assert model_digest(results / "last_model.pt") == oracle(tmp_path, data, TRAINING)
    tell("the final model is that of an undisturbed run, tensor for tensor")
