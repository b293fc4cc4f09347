"""A small alliance's kits, made once and copied by the tests that break them. No secret of them is ever printed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from heterosync.flare.kits.project import loopback, make_project
from heterosync.flare.kits.provision import provision

SITES = """\
site,org,admin,lead,member
site-a,clinic_a,admin@clinic-a.org,lead@clinic-a.org,
site-b,clinic_b,admin@clinic-b.org,,member@clinic-b.org
"""
NAME = "toy"
ADMIN = "admin@alliance.org"


def write_sites(folder: Path, text: str = SITES) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sites.csv"
    path.write_text(text, encoding="utf-8")
    return path


def toy_project(folder: Path, port: int = 8002) -> dict:
    return make_project(NAME, loopback(port), ADMIN, write_sites(folder))


def toy_kits(folder: Path, port: int = 8002) -> Path:
    """The folder with the kits of server, two sites and five users."""
    kits, _ = provision(toy_project(folder, port), folder / "kits")
    return kits[0].parent


def copy_kit(kit: Path, to: Path) -> Path:
    return Path(shutil.copytree(kit, to / kit.name))


def environment(home: Path) -> dict[str, str]:
    """For FLARE's commands and scripts: this Python first, this package at hand, a home of its own."""
    package = str(Path(__file__).resolve().parents[1] / "custom")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "HOME": str(home), "PATH": path, "PYTHONPATH": package}


def run(command: list[str], home: Path, folder: Path | None = None, timeout: float = 120) -> tuple[int, str]:
    """(exit code, output) of a command that ends by itself."""
    done = subprocess.run(
        command, cwd=folder or home, env=environment(home), capture_output=True, text=True, timeout=timeout
    )
    return done.returncode, done.stdout + done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
