"""The package as a hospital installs it: a wheel in an environment of its own, a job run from another folder.

Its dependencies are not downloaded again: the environment borrows them from this one, below its own packages. That the
wheel asks for all of them is checked against what the package imports.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest

from flare_toys import bare_environment
from toys import SMOKE, toy_alliance

ROOT = Path(__file__).resolve().parents[2]
PIP = ("-m", "pip", "--disable-pip-version-check")

pytestmark = [pytest.mark.flare, pytest.mark.slow]


def run(*words: object, cwd: Path, program: object = sys.executable) -> subprocess.CompletedProcess:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "HETEROSYNC_DATA")}
    return subprocess.run(
        [*map(str, (program, *words))], cwd=cwd, env=clean, capture_output=True, text=True, timeout=500
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "custom", source / "custom", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    words = ("wheel", "--no-deps", "--no-build-isolation", "-w", folder, source)
    built = run(*PIP, *words, cwd=folder)
    assert built.returncode == 0, built.stderr
    shutil.rmtree(source)
    (path,) = folder.glob("heterosync-*.whl")
    return path


def test_the_wheel_asks_for_everything_that_it_imports(wheel: Path) -> None:
    imported: set[str] = set()
    with ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                for node in ast.walk(ast.parse(archive.read(name))):
                    if isinstance(node, ast.Import):
                        imported |= {alias.name.split(".")[0] for alias in node.names}
                    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                        imported.add(node.module.split(".")[0])
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        lines = archive.read(metadata).decode().splitlines()
    asked = {
        re.match(r"Requires-Dist: ([\w.-]+)", line)[1].lower()
        for line in lines
        if line.startswith("Requires-Dist:") and "extra ==" not in line
    }
    third_party = imported - set(sys.stdlib_module_names) - {"heterosync"}
    assert {"torch", "nvflare", "numpy", "yaml", "PIL"} <= third_party
    owners = packages_distributions()
    absent = {name for name in third_party if not asked & {owner.lower() for owner in owners.get(name, [name])}}
    assert not absent


def test_the_wheel_runs_the_simulator_job_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    environment, elsewhere = tmp_path / "environment", tmp_path / "elsewhere"
    elsewhere.mkdir()
    python = bare_environment(environment)
    done = run(*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    assert done.returncode == 0, done.stderr

    where = run("-c", "import heterosync; print(heterosync.__file__)", cwd=elsewhere, program=python)
    assert Path(where.stdout.strip()).is_relative_to(environment), where.stderr
    toy_alliance(elsewhere / "data", 2)
    settings = [f"--set={name}={json.dumps(value)}" for name, value in SMOKE.items()]
    cli = environment / "bin" / "heterosync"
    job = run("job", "export", "hsl", "--out", "jobs", *settings, cwd=elsewhere, program=cli)
    assert job.returncode == 0, job.stderr
    words = ("simulate", "jobs/hsl", "--data", "data", "--workspace", "ws", "--timeout", "400", "--json")
    simulated = run(*words, cwd=elsewhere, program=cli)
    assert simulated.returncode == 0, simulated.stderr
    results = Path(json.loads(simulated.stdout)["results"])
    assert json.loads((results / "run.json").read_text())["status"] == "completed"

    out = ("--partner", "sat_mean", "--out", "scores.csv")
    model, image = results / "best_model.pt", Path("data/site-a/images.npz")
    scored = run("predict", model, image, *out, cwd=elsewhere, program=cli)
    assert scored.returncode == 0, scored.stderr  # the simulation has put the partner images into the model
    assert len((elsewhere / "scores.csv").read_text().splitlines()) == 41
