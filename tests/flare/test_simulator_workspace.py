"""What an earlier run left in a workspace is never taken for this one."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running import simulator_process
from heterosync.flare.running.simulator import SimulationFailed, simulate
from toys import toy_alliance


def test_a_simulator_that_does_nothing_inherits_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_process, "COMMAND", (sys.executable, "-c", "pass"))
    toy_alliance(tmp_path / "data", 1)
    job, workspace = build_job("local", tmp_path / "job", JobOptions()), tmp_path / "ws"
    (workspace / "local").mkdir(parents=True)
    (workspace / "local" / "resources.json").write_text("{}")
    for folder in (workspace / "server" / "simulate_job", workspace / "results"):
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"status": "completed"}))
        (folder / "best_model.pt").write_text("old")
    with pytest.raises(SimulationFailed, match="status 'not started'") as caught:
        simulate(job, workspace, ["site-a"], tmp_path / "data", log=None, timeout=60)
    assert caught.value.result.status == "failed"
    assert not list(caught.value.result.results.iterdir())
