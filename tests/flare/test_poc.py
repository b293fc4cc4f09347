"""One job in FLARE's POC mode: the same model as everywhere, and nothing left behind in any case."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from federation_toys import model_digest, until
from heterosync.errors import UserError
from heterosync.federation.runner import run_inprocess
from heterosync.files import write_json, write_text
from heterosync.flare.jobs.builder import build_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.kits import policy
from heterosync.flare.running.poc import COMMANDS, SERVER, _Poc, _project, free_port, run_poc
from heterosync.flare.running.processes import package_environment
from toys import SMOKE, toy_alliance

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.poc]


def processes_of(out: Path) -> list[psutil.Process]:
    """Processes whose command line or POC workspace lies below `out`."""
    found = []
    for process in psutil.process_iter():
        try:
            where = [*process.cmdline(), process.environ().get("NVFLARE_POC_WORKSPACE", "")]
        except (psutil.Error, OSError):
            continue
        if process.pid != os.getpid() and any(word.startswith(f"{out}/") for word in where):
            found.append(process)
    return found


def test_poc_gives_the_same_model_as_one_process(tmp_path):
    data = toy_alliance(tmp_path / "data", 2)
    job = build_job("hsl", tmp_path / "job", JobOptions(training=SMOKE))
    before = (Path.home() / ".nvflare").exists()
    said: list[str] = []
    result = run_poc(job, data, tmp_path / "poc", timeout=300, say=said.append)
    assert not processes_of(tmp_path / "poc")
    run_inprocess("hsl", data, tmp_path / "oracle", training=SMOKE)
    for name in ("last_model.pt", "best_model.pt"):
        digests = {model_digest(folder / name) for folder in (result.results, tmp_path / "oracle")}
        assert len(digests) == 1, name
    # what a user sees and keeps
    text = "\n".join(said)
    assert "round 1/2, site site-b: " in text and "round 2/2 done " in text
    for command in ("poc prepare", "poc start", "job submit", "job download", "poc stop", "poc clean"):
        assert f"$ nvflare {command}" in text
        assert f"\nnvflare {command}" in (tmp_path / "poc" / COMMANDS).read_text()
    for folder in result.sites.values():
        kept = ("results/predictions.csv", "job/audit.jsonl", "job/audit_site.jsonl", "training/trainer.log")
        assert [name for name in kept if not (folder / name).is_file()] == []
    assert not (tmp_path / "poc" / "poc").exists(), "the workspace is removed"
    assert (Path.home() / ".nvflare").exists() == before, "the user's own settings stay as they were"


def test_the_policy_of_a_kit_lies_in_the_workspace_and_what_a_site_leaves_is_kept(tmp_path):
    poc = _Poc(tmp_path / "poc", {"site-a": tmp_path / "data"}, lambda line: None)
    poc.prepare()
    for name, kind in ((SERVER, "server"), ("site-a", "client")):
        local = poc.kit(name) / "local"
        files = policy.local_files(kind, json.loads((local / "resources.json.default").read_text()))
        if kind == "client":
            files["privacy.json"]["scopes"][0]["properties"]["data_root"] = str(tmp_path / "data")
        assert {file: json.loads((local / file).read_text()) for file in files} == files
    run = "12345678-1234-1234-1234-123456789012"
    left = {
        "log.txt": "log.txt",
        f"{run}/log.txt": "job/log.txt",
        f"{run}/audit.jsonl": "job/audit.jsonl",
        f"{run}/audit_site.jsonl": "job/audit_site.jsonl",
        f"{run}/best_model.pt": "job/best_model.pt",  # in a swarm
        f"{run}/heterosync/results/predictions.csv": "results/predictions.csv",
        f"trainings/{run}/trainer.log": "training/trainer.log",
        f"trainings/{run}/privacy.jsonl": "training/privacy.jsonl",
        f"trainings/{run}/own_best.pt": "training/own_best.pt",
    }
    for name in (*left, f"{run}/meta.json", f"trainings/{run}/state.pt"):
        write_text(poc.kit("site-a") / name, name)
    folder = poc.collect_sites()["site-a"]
    kept = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}
    assert kept == {place: name for name, place in left.items()}


def test_a_job_that_brings_code_is_refused_before_anything_is_started(tmp_path):
    job = build_job("hsl", tmp_path / "job", JobOptions(training=SMOKE), byoc=True)
    with pytest.raises(UserError, match="export it without --byoc"):
        run_poc(job, toy_alliance(tmp_path / "data", 1), tmp_path / "poc")
    assert not (tmp_path / "poc").exists()


def test_a_job_that_cannot_start_leaves_one_cause_and_no_process(tmp_path):
    data = toy_alliance(tmp_path / "data", 1)
    job = build_job("local", tmp_path / "job", JobOptions(training=SMOKE))
    path = job / "app" / "config" / "config_fed_server.json"
    config = json.loads(path.read_text())
    config["components"].append({"id": "x", "path": "heterosync.flare.running.poc.run_poc", "args": {}})
    write_json(path, config)
    with pytest.raises(UserError, match="not in allow_list"):
        run_poc(job, data, tmp_path / "poc", timeout=120, say=lambda line: None)
    assert not processes_of(tmp_path / "poc")
    with pytest.raises(UserError, match="holds an earlier POC"):
        run_poc(job, data, tmp_path / "poc")


@pytest.mark.parametrize(
    "number, code, line",
    [(signal.SIGINT, 130, "round 1/500 done"), (signal.SIGTERM, 143, "$ nvflare poc start")],
    ids=["in the middle", "while it starts"],
)
def test_interrupted_it_leaves_no_process(tmp_path, number, code, line):
    toy_alliance(tmp_path / "data", 2)
    job = build_job("hsl", tmp_path / "job", JobOptions(training={**SMOKE, "rounds": 500}))
    out = tmp_path / "poc"
    command = ["-m", "heterosync.cli", "poc", str(job), "--data", str(tmp_path / "data"), "--out", str(out)]
    child = subprocess.Popen(
        [sys.executable, "-u", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=package_environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert child.stdout is not None
    assert any(said.startswith(line) for said in child.stdout)
    until(lambda: processes_of(out), 60, "processes are there")
    child.send_signal(number)
    began = time.monotonic()
    child.communicate(timeout=60)
    assert child.returncode == code
    assert time.monotonic() - began < 30
    assert not [process for process in processes_of(out) if process.pid != child.pid]


def test_the_server_of_a_poc_listens_on_loopback_only_and_two_pocs_do_not_collide(tmp_path):
    """`free_port` and the name of the server; checked on the project file, without a start."""
    ports = {free_port() for _ in range(5)}
    assert len(ports) > 1
    server = next(entry for entry in _project(["site-a"], 1234)["participants"] if entry["type"] == "server")
    assert server["name"] == SERVER and socket.gethostbyname(SERVER).startswith("127.")
