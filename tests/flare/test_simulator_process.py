"""The watch over FLARE's simulator: what it shows, what it takes for the cause, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.running import simulator, simulator_process
from heterosync.flare.running.simulator import SimulationFailed, simulate
from heterosync.flare.running.simulator_process import Output
from toys import toy_alliance

EXECUTOR = "heterosync.flare.executor.HeteroSyncExecutor"
CONTROLLER = "heterosync.flare.controller.HeteroSyncController"


def told(*lines: str) -> tuple[Output, list[str]]:
    shown: list[str] = []
    output = Output(shown.append)
    for line in lines:
        output.take(line + "\n")
    return output, shown


def test_progress_is_shown_and_flares_noise_is_not() -> None:
    output, shown = told(
        "nvflare.private.fed.ClientRunner - INFO - got task assignment",
        f"{EXECUTOR} - INFO - site site-a: ready for tasks",
        f"{CONTROLLER} - INFO - Round 0 started.",
        f"{EXECUTOR} - INFO - site site-a: round 1/2, epoch 1/1: loss 0.7",
        "heterosync - INFO - round 1/2 done in 1.3 s by site-a, about 1.3 s left",
        "heterosync - INFO - run completed after 3.0 s: /x",
    )
    assert shown == [
        "site site-a: round 1/2, epoch 1/1: loss 0.7",
        "round 1/2 done in 1.3 s by site-a, about 1.3 s left",
        "run completed after 3.0 s: /x",
    ]
    assert len(output.ready) == 1 and output.finished and output.cause() == ""


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        (
            [
                f"{CONTROLLER} - WARNING - PROBLEM: the check-in: site-b failed",
                f"{EXECUTOR} - WARNING - PROBLEM: row 3",
            ],
            "row 3",
        ),
        ([f"{CONTROLLER} - WARNING - PROBLEM: site site-b: another anchor"], "site site-b: another anchor"),
        ([f"{EXECUTOR} - WARNING - PROBLEM: row 3", f"{EXECUTOR} - WARNING - PROBLEM: row 4"], "row 3\nrow 4"),
        (["Traceback (most recent call last):", '  File "x"', "KeyError: 'w'", "ValueError: later"], "KeyError: 'w'"),
        (["nvflare.x - ERROR - Cannot bind port"], "Cannot bind port"),
        (
            ["ConfigError: Error processing in element '{...}': path: 'w', exception: 'TypeError: no 'foo'.'"],
            "FLARE cannot load the job: TypeError: no 'foo'",
        ),
    ],
)
def test_one_readable_cause(lines: list[str], cause: str) -> None:
    assert told(*lines)[0].cause() == cause


FAKE = """
import os, subprocess, sys, time
mode, mark = os.environ["FAKE"], os.environ["MARK"]
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", mark], start_new_session=True)
print("nvflare.x - INFO - starting", flush=True)
if mode == "works":
    print("heterosync.flare.executor.HeteroSyncExecutor - INFO - site site-a: ready for tasks", flush=True)
time.sleep(600)
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Arguments of a simulation whose simulator is a script that hangs, with a child in a session of its own."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(simulator_process, "COMMAND", (sys.executable, "-u", str(tmp_path / "fake.py")))
    monkeypatch.setenv("MARK", f"mark-{tmp_path}")
    toy_alliance(tmp_path / "data", 1)
    job = build_job("local", tmp_path / "job", JobOptions())
    return {"job": job, "workspace": tmp_path / "ws", "sites": ["site-a"], "data": tmp_path / "data", "log": None}


def left(mark: str) -> list[int]:
    return [p.pid for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]


def test_a_start_that_hangs_is_tried_again_and_leaves_nothing(fake: dict, monkeypatch) -> None:
    monkeypatch.setenv("FAKE", "hangs")
    shown: list[str] = []
    with pytest.raises(SimulationFailed) as caught:
        simulate(**{**fake, "log": shown.append}, patience=1.5)
    assert caught.value.result.status == "hung" and "hung at its start" in str(caught.value)
    assert len([line for line in shown if "starting it again" in line]) == 1
    assert "starting" in caught.value.result.log.read_text()
    assert not left(os.environ["MARK"])


def test_a_time_limit_ends_all_processes(fake: dict, monkeypatch) -> None:
    monkeypatch.setenv("FAKE", "works")
    began = time.monotonic()
    with pytest.raises(SimulationFailed, match="not finished within 3 s"):
        simulate(**fake, timeout=3.0, patience=1.0)
    assert time.monotonic() - began < 20 and not left(os.environ["MARK"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_terminate_leave_nothing(fake: dict, tmp_path: Path, number: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        # A parent in the background hands down an ignored SIGINT; a person's terminal does not.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from heterosync.flare.running import simulator_process\n"
        f"simulator_process.COMMAND = {simulator_process.COMMAND!r}\n"
        "from heterosync.flare.running.simulator import simulate\n"
        f"simulate({str(fake['job'])!r}, {str(fake['workspace'])!r}, ['site-a'], {str(fake['data'])!r})\n"
    )
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "FAKE": "works", "PYTHONPATH": paths}
    process = subprocess.Popen([sys.executable, str(program)], env=environment, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            if left(os.environ["MARK"]):
                break
            time.sleep(0.1)
        assert left(os.environ["MARK"])
        time.sleep(0.5)
        process.send_signal(number)
        assert process.wait(30) != 0
    finally:
        process.kill()
    assert not left(os.environ["MARK"])


def test_the_environment_holds_the_data_the_package_and_a_share_of_the_processor(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    environment = simulator._environment(tmp_path, 3, None)
    assert environment["HETEROSYNC_DATA"] == str(tmp_path) and environment["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert simulator._environment(tmp_path, 3, None)["OMP_NUM_THREADS"] == "5"
