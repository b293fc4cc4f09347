"""The command of the README without anything of ours around it: `nvflare simulator JOB -w poc/simulator`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

import heterosync
from flare_toys import bare_environment
from heterosync.cli import main
from heterosync.federation.modelfile import load_model
from heterosync.flare import messages
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from toys import SMOKE, toy_alliance

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 300.0

pytestmark = [pytest.mark.flare, pytest.mark.slow]


def plain(
    *words: object, cwd: Path, environment: dict[str, str], python: Path | str = sys.executable
) -> tuple[int, str]:
    """`nvflare WORDS`, in a session of its own, whose processes (and those that left it) all end with it."""
    command = [str(python), "-m", "nvflare.cli", *map(str, words)]
    log = cwd / "output.txt"
    with log.open("w") as file:
        child = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        return child.wait(LIMIT), log.read_text()
    finally:
        tree = []
        with suppress(psutil.Error):
            tree = psutil.Process(child.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        for process in tree:
            with suppress(psutil.Error):
                process.kill()
        child.wait()


def test_the_plain_command_runs_an_exported_job(tmp_path: Path) -> None:
    toy_alliance(tmp_path / "data", 2)
    job = build_job("hsl", tmp_path / "hsl", JobOptions(training=SMOKE, in_process=True))
    workspace = tmp_path / "ws"
    shutil.copytree(ROOT / "poc" / "simulator" / "local", workspace / "local")
    environment = {
        **os.environ,
        "HETEROSYNC_DATA": str(tmp_path / "data"),
        "PYTHONPATH": str(Path(heterosync.__file__).resolve().parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    words = ("simulator", job, "-w", workspace, "-c", "site-a,site-b", "-t", 2)
    code, output = plain(*words, cwd=tmp_path, environment=environment)
    assert code == 0, output[-3000:]
    server = workspace / "server" / "simulate_job"
    record = json.loads((server / "run.json").read_text())
    assert record["status"] == "completed" and len(record["rounds"]) == SMOKE["rounds"]
    assert [r["contributors"] for r in record["rounds"]] == [["site-a", "site-b"]] * 2
    assert load_model(server / "last_model.pt", "hsl").round == 2
    metrics = json.loads((server / "cross_site_metrics.json").read_text())
    assert {"site-a", "site-b"} <= set(metrics["best"]) and (server / "history.csv").exists()
    for site in ("site-a", "site-b"):
        assert (workspace / site / "simulate_job" / "heterosync" / "results" / "predictions.csv").exists()


def test_a_job_that_brings_the_package_needs_none_installed(tmp_path: Path) -> None:
    """`--byoc`: no installation, no allow-list of ours; the version shows which copy of the package ran, and where."""
    python = bare_environment(tmp_path / "environment")
    toy_alliance(tmp_path / "data", 2)
    settings = [f"--set={name}={json.dumps(value)}" for name, value in SMOKE.items()]
    assert main(["job", "export", "hsl", "--out", str(tmp_path / "jobs"), "--byoc", *settings]) == 0
    job = tmp_path / "jobs" / "hsl"
    packed = job / "app" / "custom" / "heterosync" / "__init__.py"
    packed.write_text(packed.read_text().replace(heterosync.__version__, "0.0.1"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HETEROSYNC_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    words = ("simulator", job, "-w", tmp_path / "ws", "-c", "site-a,site-b", "-t", 2)
    code, output = plain(*words, cwd=tmp_path, environment=environment, python=python)
    assert code == 0, output[-3000:]
    server = tmp_path / "ws" / "server" / "simulate_job"
    record = json.loads((server / "run.json").read_text())
    assert record["status"] == "completed" and len(record["rounds"]) == SMOKE["rounds"]
    versions = [record["versions"], *(report["versions"] for report in record["check_in"].values())]
    assert [found["heterosync"] for found in versions] == ["0.0.1"] * 3  # the sites' come from their trainer processes
    assert load_model(server / "best_model.pt", "hsl").versions["heterosync"] == "0.0.1"


def test_the_last_lines_name_what_a_user_has_to_mend(tmp_path: Path) -> None:
    toy_alliance(tmp_path / "data", 1)
    job = build_job("hsl", tmp_path / "hsl", JobOptions(training=SMOKE, in_process=True), byoc=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HETEROSYNC_DATA": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    words = ("simulator", job, "-w", tmp_path / "ws", "-c", "site-a,site-b", "-t", 2)
    code, output = plain(*words, cwd=tmp_path, environment=environment)
    assert code != 0
    problems = [line for line in output.splitlines() if messages.PROBLEM in line or " run failed: " in line]
    assert "run failed: the check-in: fewer than the 2 sites" in problems[-2] and "site site-b: " in problems[-2]
    assert "site site-b: HETEROSYNC_DATA has no folder 'site-b'" in problems[-1] and "known: site-a" in problems[-1]
