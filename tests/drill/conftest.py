"""The drill: faults that need root, minutes or gigabytes. `make drill` runs it; without `-m drill` it is not collected.

DRILL_RECORD names a file that gets the outcome of every drill and what it measured.
"""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from toys import toy_alliance

_facts: dict[str, list[str]] = {}
_titles: dict[str, str] = {}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if "drill" in config.option.markexpr else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        title = inspect.getdoc(getattr(item, "function", None)) if item.get_closest_marker("drill") else None
        _titles[item.nodeid] = title or item.name.removeprefix("test_").replace("_", " ")


def pytest_runtestloop() -> None:
    """A fresh network namespace has its loopback device down."""
    if [name for _, name in socket.if_nameindex()] == ["lo"]:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


def pytest_terminal_summary(terminalreporter) -> None:
    paragraphs = [f"FLARE {version('nvflare')}, torch {version('torch')}; tiny images, three sites on one machine.\n"]
    for outcome in ("passed", "failed", "error", "skipped"):
        for report in terminalreporter.getreports(outcome):
            reason = [report.longrepr[2].removeprefix("Skipped: ")] if outcome == "skipped" else []
            facts = "".join(f"\n    {fact}" for fact in [*_facts.get(report.nodeid, []), *reason])
            paragraphs.append(f"{outcome.upper()}  {_titles[report.nodeid]}{facts}\n")
    text = "\n".join(paragraphs)
    terminalreporter.write_line(text)
    if "DRILL_RECORD" in os.environ:
        Path(os.environ["DRILL_RECORD"]).write_text(text, encoding="utf-8")


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Put a measured fact on record."""
    return _facts.setdefault(request.node.nodeid, []).append


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return toy_alliance(tmp_path_factory.mktemp("drill") / "data", 3)
