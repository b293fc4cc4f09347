"""What stands in a job folder that the builder (builder.py) wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from heterosync.errors import UserError
from heterosync.flare.jobs import allowlist
from heterosync.methods import get_method

APP = "app"


def replaces_job(folder: Path | str) -> bool:
    """Whether a job that this builder wrote stands at `folder`. Raises `UserError` when anything else stands there."""
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    try:
        read_learning(folder)
        return True
    except UserError:
        raise UserError(f"{folder} holds files that are no heterosync job: remove them or choose another one") from None


def is_swarm(job: Path | str) -> bool:
    """Whether the job folder `job` lets the sites fuse among themselves; False for a folder that is no job of ours."""
    try:
        config = json.loads((Path(job) / APP / "config" / "config_fed_server.json").read_text(encoding="utf-8"))
        return bool(config["workflows"][0]["path"] == allowlist.SWARM_CONTROLLER)
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return False


def is_split(job: Path | str) -> bool:
    """Whether the sites of the job folder `job` meet in every step; False for a folder that is no job of ours."""
    try:
        return get_method(read_learning(job)["method"]).split
    except UserError:
        return False


def read_learning(job: Path | str) -> dict[str, Any]:
    """{method, method_settings, training} of a job folder that this builder wrote. Raises `UserError` for any other."""
    path = Path(job) / APP / "config" / "config_fed_server.json"
    try:
        workflows = json.loads(path.read_text(encoding="utf-8"))["workflows"]
        args = workflows[0]["args"]
        return {key: args[key] for key in ("method", "method_settings", "training")}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{job} is not a heterosync job folder: write one with `heterosync job export`") from error
