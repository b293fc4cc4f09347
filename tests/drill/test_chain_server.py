"""A training as a chain of jobs in a provisioned alliance: the server is killed, a site returns and another joins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from federation_toys import SERVER, federation, model_digest
from heterosync.federation.runner import run_inprocess
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running.chain import LOST, STATE, Chain
from heterosync.flare.running.session import COMPLETED
from toys import SMOKE, toy_alliance

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.secure]

TRAINING = {**SMOKE, "rounds": 4, "local_epochs": 25, "patience": 25}
TWO = ["site-a", "site-b"]


def test_a_chain_outlives_its_server(tmp_path: Path) -> None:
    """kill -9 of the server in the third round: FLARE calls that job running for ever; the same command goes on."""
    data = toy_alliance(tmp_path / "data", 2)
    job = build_job("hsl", tmp_path / "job", JobOptions(training=TRAINING, in_process=True))
    lines: list[str] = []
    with federation(tmp_path / "alliance", data) as running:

        def say(line: str) -> None:
            print(line, flush=True)
            lines.append(line)
            if line.startswith("round 3/4, site") and not killed:
                killed.append(line)
                running.kill(SERVER)
                running.start(SERVER)

        killed: list[str] = []
        chain = Chain(job, tmp_path / "out", 2, say, look=1.0)
        results = chain.run(running.session())
        segments = json.loads((tmp_path / "out" / STATE).read_text())["segments"]
    assert killed and [segment["status"] for segment in segments] == [COMPLETED, LOST, COMPLETED], lines
    assert [line for line in lines if "running for ever, though nothing runs" in line]
    run_inprocess("hsl", data, tmp_path / "oracle", {}, TRAINING)
    for name in ("last_model.pt", "best_model.pt"):
        assert model_digest(results / name) == model_digest(tmp_path / "oracle" / name)
    record = json.loads((results / "run.json").read_text())
    assert record["status"] == "completed"
    # the round in progress is lost, unless it was just finished
    assert [s["first_round"] for s in record["segments"]] in ([0, 2, 2], [0, 2, 3])
