"""Jobs that go on with a training: the same configuration, plus the training's id and how far to go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heterosync.errors import UserError
from heterosync.federation.wire import is_site_name
from heterosync.files import explained, new_folder, read_json, write_json, write_text
from heterosync.flare.jobs import allowlist
from heterosync.flare.jobs.folder import APP, read_learning
from heterosync.training.settings import LoopSettings

CONFIGS = tuple(f"{APP}/config/config_fed_{kind}.json" for kind in ("server", "client"))


def segment_job(
    job: Path | str, out: Path | str, training_id: str = "", segment_rounds: int = 0, rounds: int | None = None
) -> Path:
    """Write the job folder `out`, a segment of a training: a copy of `job` that does at most `segment_rounds` rounds.

    training_id: the id of the training's first job, whose stored model and round the job goes on from; "" for the first
    job itself. segment_rounds: 0 for all that are left. rounds: how many the training has in all; None leaves that.
    Raises `UserError` when `job` is none of ours or `out` is not empty.
    """
    job, training = Path(job), read_learning(job)["training"]
    if training_id and not is_site_name(training_id):
        raise UserError(f"'{training_id}' is no id of a training: give the id of its first job")
    if rounds is not None:
        training = {**training, "rounds": LoopSettings(rounds=rounds).rounds}
    configs = {name: read_json(job / name) for name in CONFIGS}
    for config in configs.values():
        for part in _parts(config):
            if "training" in part["args"]:
                part["args"]["training"] = training
            if part["path"] in (allowlist.CONTROLLER, allowlist.EXECUTOR, allowlist.DP_FILTER):
                part["args"]["training_id"] = training_id
            if part["path"] == allowlist.CONTROLLER:
                part["args"]["segment_rounds"] = segment_rounds
    if not any(part["path"] == allowlist.CONTROLLER for part in _parts(configs[CONFIGS[0]])):
        raise UserError(f"{job}: only a job whose server keeps the global model can be resumed; this one's keeps none")
    with new_folder(out) as folder, explained(out):
        shutil.copytree(job, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".__nvfl_*"))
        for name, config in configs.items():
            write_json(folder / name, config)
        readme = folder / "README.md"
        text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
        write_text(readme, text + _words(training_id, segment_rounds))
    return Path(out)


def job_of(folder: Path | str) -> tuple[str, Path]:
    """(training id, job folder) of a finished job as FLARE's download left it: `workspace/run.json` beside `job/`.

    `folder` may be either of them, or their parent. Raises `UserError` when it is no download of a job of ours.
    """
    folder = Path(folder)
    parent = next((place for place in (folder, folder.parent) if (place / "workspace" / "run.json").is_file()), None)
    if parent is None:
        raise UserError(f"{folder} is not a downloaded job (workspace/run.json, job/): download it, or give its id")
    run = read_json(parent / "workspace" / "run.json")
    if not run.get("training_id"):
        raise UserError(f"{parent}: its run.json names no training: it cannot be resumed")
    return str(run["training_id"]), parent / "job"


def training_id_of(job: Path | str) -> str:
    """The training that a job folder goes on with; "" when it begins one."""
    try:
        config = json.loads((Path(job) / CONFIGS[0]).read_text(encoding="utf-8"))
        found = [part["args"] for part in _parts(config) if part["path"] == allowlist.CONTROLLER]
        return str(found[0].get("training_id", "")) if found else ""
    except (OSError, ValueError):
        return ""  # FLARE will say what is wrong with this job


def _parts(config: Any) -> Iterator[dict[str, Any]]:
    """Every component of a configuration: a table with `path` and `args`."""
    if isinstance(config, dict):
        if isinstance(config.get("path"), str) and isinstance(config.get("args"), dict):
            yield config
        for value in config.values():
            yield from _parts(value)
    elif isinstance(config, list):
        for value in config:
            yield from _parts(value)


def _words(training_id: str, segment_rounds: int) -> str:
    begins = f"goes on with the training that job `{training_id}` began" if training_id else "begins a training"
    ends = f"after {segment_rounds} rounds at most" if segment_rounds else "with the last round"
    return f"""
## A segment of a training

This job {begins}: from the model and the round that the server stored, and from what each site
stored of itself. It ends {ends}. A site that takes part for the first time starts from the global model.
"""
