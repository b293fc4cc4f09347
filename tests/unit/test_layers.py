"""Imports go downwards only, and only the rooms that may know FLARE do."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import heterosync
from heterosync.methods import METHODS

ROOT = Path(heterosync.__file__).parent

#: Each room and the rooms that it may import from (besides itself and the files at the top: errors, files, pulse).
MAY_IMPORT = {
    "data": set(),
    "models": set(),
    "training": {"data", "models"},
    "methods": {"data", "models", "training"},
    "federation": {"data", "models", "training", "methods"},
    "flare": {"data", "models", "training", "methods", "federation"},
    "study": {"data", "models", "training", "methods", "federation"},
    "cli": {"data", "models", "training", "methods", "federation", "flare", "study"},
}
FILES = sorted(ROOT.rglob("*.py"))


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, at the top level) of every import in a file, those inside functions included."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = set(map(id, tree.body))
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names = [str(node.module)]
            if node.module == "heterosync":  # `from heterosync import errors`
                names = [f"heterosync.{alias.name}" for alias in node.names]
        found += [(name, id(node) in top) for name in names]
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_downwards(path):
    room = room_of(path)
    allowed = MAY_IMPORT.get(room, set()) | {room, "errors", "files", "pulse", "__version__"}
    for module, _ in imports_of(path):
        if module.startswith("heterosync."):
            assert module.split(".")[1] in allowed, f"{room} may not import {module}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_only_flare_imports_nvflare(path):
    if room_of(path) == "flare":
        return
    assert not [module for module, _ in imports_of(path) if module.split(".")[0] == "nvflare"]


def test_no_files_import_each_other_in_a_circle():
    """Also not within functions or for type checkers only: a circle says that two files are one thing, or three."""
    names = {path: ".".join(path.relative_to(ROOT.parent).with_suffix("").parts) for path in FILES}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}
    graph = {module: uses_of(path) & modules.keys() - {module} for module, path in modules.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError with the names


def uses_of(path: Path) -> set[str]:
    """Modules that a file imports, or imports names from."""
    found = {module for module, _ in imports_of(path)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_commands_import_heavy_things_only_when_called():
    for path in (ROOT / "cli").glob("*.py"):
        for module, top in imports_of(path):
            light = module.startswith(("heterosync.cli", "heterosync.errors", "heterosync.__version__"))
            if top and module.split(".")[0] in ("heterosync", "torch", "numpy", "nvflare", "matplotlib"):
                assert light, f"{path.name} imports {module} at its top"


def test_every_room_is_listed():
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == set(MAY_IMPORT)


def test_no_method_imports_another():
    """What several methods use lies in files of methods/ that hold no method."""
    names = {method.__module__.rpartition(".")[2] for method in METHODS}
    for name in names:
        for module, _ in imports_of(ROOT / "methods" / f"{name}.py"):
            last = module.split(".")[-1]
            assert not (module.startswith("heterosync.methods.") and last in names), f"{name} imports {last}"
