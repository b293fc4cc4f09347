"""What a release is made of: the wheel with its data files, the pinned set, the citation."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import heterosync

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy, so that nothing is left in the work tree, and without the network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / "custom", source / "custom", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", out, source]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("heterosync-*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_every_module_and_data_file(wheel):
    inside = {name for name in wheel.namelist() if name.startswith("heterosync/")}
    root = ROOT / "custom"
    wanted = {
        path.relative_to(root).as_posix()
        for path in (root / "heterosync").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert inside == wanted
    assert "heterosync/py.typed" in inside and "heterosync/data/scenarios/combined.csv" in inside


def test_wheel_has_the_command_and_the_licence(wheel):
    names = {name.split("/", 1)[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "heterosync = heterosync.cli:main" in wheel.read(names["entry_points.txt"]).decode()
    assert "Apache License" in wheel.read(names["licenses/LICENSE"]).decode()
    metadata = wheel.read(names["METADATA"]).decode()
    assert f"Version: {heterosync.__version__}" in metadata and "License-Expression: Apache-2.0" in metadata


def test_every_dependency_is_pinned_in_the_tried_set():
    text = (ROOT / "pyproject.toml").read_text()
    wanted = set(re.findall(r'^    "([a-z0-9-]+)>=', text, re.MULTILINE))
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split(";")[0].strip().split("==")
            pinned[name] = version
    assert {"nvflare", "torch", "psutil"} <= wanted <= set(pinned)
    assert (pinned["torch"], pinned["torchvision"]) == ("2.15.0", "0.29.2")
    assert pinned["nvflare"].startswith("2.9.")


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    tree = (node for file in (ROOT / "custom").rglob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    imported = set()
    for node in tree:
        if isinstance(node, ast.Import):
            imported |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module.split(".")[0])
    imported -= {*sys.stdlib_module_names, "heterosync"}
    names = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml"}
    declared = set(re.findall(r'^    "([a-z0-9-]+)>=', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    # scikit-learn is what the tests compare the package's own metrics with
    assert {names.get(name, name) for name in imported} | {"scikit-learn"} == declared


def test_the_readme_names_what_leaves_a_site_besides_weights():
    text = (ROOT / "README.md").read_text()
    section = text.split("## What leaves a site")[1].split("\n## ")[0]
    for part in ("n_positive", "W2", "split sizes", "precision", "initial weights"):
        assert part in section, part
    assert "`withhold`" in section


def test_documents_keep_up_with_the_code():
    from heterosync.cli import build_parser
    from heterosync.flare.executor import DATA_ROOT
    from heterosync.methods import bytes_per_round, make_method

    (commands,) = (action for action in build_parser()._actions if action.dest == "command")
    listed = re.search(r"Commands: `heterosync (.*)`", (ROOT / "CHANGELOG.md").read_text())
    assert listed and set(listed[1].split(" | ")) == set(commands.choices)
    places = (ROOT / "docs" / "data.md").read_text().split("1. ")[1].split("3. ")[0]
    assert re.search(f"`{DATA_ROOT}`.*privacy.json.*HETEROSYNC_DATA", places, re.DOTALL)
    hsl = make_method("hsl")
    size = f"{bytes_per_round(hsl, hsl.build_model(weights='none')) / 2**20:.1f} MiB"
    for text in (ROOT / "README.md", ROOT / "docs" / "hsl.md", ROOT / "jobs" / "hsl" / "README.md"):
        assert set(re.findall(r"\b90\.\d MiB", text.read_text())) == {size}, text


def test_nothing_cites_a_document_that_users_do_not_have():
    unknown = re.compile(r"\bmethods\.m" r"d,? (?:section )?\d|\bDESIG" r"N\b")  # the page of methods has no numbers
    for folder in ("custom", "jobs", "docs", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".json"):
                assert not unknown.search(path.read_text(encoding="utf-8")), path


def test_citation_names_both_papers_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {paper["doi"] for paper in citation["references"]} == {"10.1038/s41467-025-64459-y", "10.1093/jamia/ocaa341"}
    assert citation["version"] == heterosync.__version__


def test_continuous_integration_runs_the_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert "make test" in script.read_text()
