"""The package as a hospital installs it: a wheel in a folder of its own, no source tree, a job run from elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from toys import SMOKE, toy_alliance

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.flare, pytest.mark.slow]


def run(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HETEROSYNC_DATA")}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=500)


def test_wheel_runs_the_simulator_job_from_another_folder(tmp_path):
    source, installed, elsewhere = tmp_path / "source", tmp_path / "installed", tmp_path / "elsewhere"
    source.mkdir()
    elsewhere.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "custom", source / "custom", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = ("-m", "pip", "--disable-pip-version-check")
    built = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, source, cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("heterosync-*.whl")
    done = run(*pip, "install", "--no-deps", "--no-index", "--target", installed, wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(source)

    where = run("-c", "import heterosync; print(heterosync.__file__)", cwd=elsewhere, PYTHONPATH=str(installed))
    assert Path(where.stdout.strip()).is_relative_to(installed)
    toy_alliance(elsewhere / "data", 2)
    settings = [f"--set={name}={json.dumps(value)}" for name, value in SMOKE.items()]
    cli = ("-m", "heterosync.cli")
    job = run(*cli, "job", "export", "hsl", "--out", "jobs", *settings, cwd=elsewhere, PYTHONPATH=str(installed))
    assert job.returncode == 0, job.stderr
    words = ("simulate", "jobs/hsl", "--data", "data", "--workspace", "ws", "--timeout", "400", "--json")
    simulated = run(*cli, *words, cwd=elsewhere, PYTHONPATH=str(installed))
    assert simulated.returncode == 0, simulated.stderr
    results = Path(json.loads(simulated.stdout)["results"])
    assert json.loads((results / "run.json").read_text())["status"] == "completed"

    out = ("--partner", "sat_mean", "--out", "scores.csv")
    model, image = results / "best_model.pt", Path("data/site-a/images.npz")
    scored = run(*cli, "predict", model, image, *out, cwd=elsewhere, PYTHONPATH=str(installed))
    assert scored.returncode == 0, scored.stderr  # the simulation has put the partner images into the model
    assert len((elsewhere / "scores.csv").read_text().splitlines()) == 41
