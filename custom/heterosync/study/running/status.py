"""How far a study is, and what of it can go."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterosync.errors import UserError
from heterosync.federation.modelfile import BEST_MODEL, LAST_MODEL
from heterosync.files import explained, read_json
from heterosync.study.layout import DATA, FAILED, PROGRESS, REPORT, RESULTS, RUNS, STUDY, WORK, read_done, read_spec
from heterosync.study.running.one import is_held
from heterosync.study.running.record import StudyRecord, read_study
from heterosync.study.running.runner import progress_of
from heterosync.study.table import text_table

DONE, RUNNING, FAILED_RUN, BROKEN, WAITING = "done", "running", "failed", "broken off", "waiting"
STATES = (DONE, RUNNING, FAILED_RUN, BROKEN, WAITING)


@dataclass(frozen=True)
class RunState:
    """One run. run: its path below `runs/`; state: one of `STATES`; cause: of a failure; seconds: so far."""

    run: str
    state: str
    rounds_done: int = 0
    rounds: int = 0
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    cause: str = ""


def states_of(study: Path) -> list[RunState]:
    """The state of every run of the plan, in its order. Raises `UserError` when `study` is not the folder of one."""
    return [_state(study, path, digest) for path, digest in read_study(study).runs.items()]


def _state(study: Path, path: str, digest: str) -> RunState:
    folder, run = study / path, path.removeprefix(f"{RUNS}/")
    try:
        done = read_done(folder)
        spec = read_spec(folder) if (folder / "run_spec.json").exists() else None
    except UserError as error:
        return RunState(run, FAILED_RUN, cause=str(error))
    if done is not None and done.digest == digest:
        return RunState(run, DONE, seconds=done.seconds, peak_memory_bytes=done.peak_memory_bytes)
    if spec is None:
        return RunState(run, WAITING)
    so_far = {name: value for name, value in progress_of(spec, study).items() if name != "run"}
    if is_held(folder / ".lock"):
        return RunState(run, RUNNING, **so_far)
    if (folder / FAILED).exists():
        return RunState(run, FAILED_RUN, **so_far, cause=str(read_json(folder / FAILED).get("cause", "")))
    return RunState(run, BROKEN if (folder / PROGRESS).exists() else WAITING, **so_far)


def status_text(study: Path, record: StudyRecord, states: list[RunState]) -> str:
    """One row per scenario and level, then what is going on or went wrong."""
    groups: dict[str, list[RunState]] = {}
    for state in states:
        scenario, level, *_ = state.run.split("/")
        groups.setdefault(scenario if level == "all" else f"{scenario} {level}", []).append(state)
    rows = [
        [name, *(str(sum(state.state == kind for state in group)) for kind in STATES)] for name, group in groups.items()
    ]
    done = sum(state.state == DONE for state in states)
    lines = [f"study {record.plan.name} in {study}: {done} of {len(states)} runs done", ""]
    lines.append(text_table(["runs", *STATES], rows))
    lines += [""] if any(state.state in (RUNNING, FAILED_RUN, BROKEN) for state in states) else []
    for state in states:
        if state.state in (RUNNING, BROKEN):
            lines.append(f"{state.run}: {state.state} after {state.rounds_done} of {state.rounds or '?'} rounds")
        elif state.state == FAILED_RUN:
            lines.append(f"{state.run}: failed: {state.cause}")
    if done < len(states) and not any(state.state == RUNNING for state in states):
        lines += ["", f"to go on: heterosync study run PLAN --out {study}"]
    return "\n".join(lines)


def removable(study: Path) -> Iterator[Path]:
    """Models and workspaces of runs that are done; their results, figures and images stay."""
    for path in read_study(study).runs:
        folder = study / path
        if read_done(folder) is None:
            continue
        found = [folder / RESULTS / BEST_MODEL, folder / RESULTS / LAST_MODEL, folder / RESULTS / "own"]
        yield from (item for item in [*found, *sorted(folder.glob(f"{WORK}*"))] if item.exists())


def size_of(paths: list[Path]) -> int:
    """Bytes of files and folders; a file with two names counts once."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in (file.stat() for file in files)}.values())


def everything(study: Path) -> list[Path]:
    """All that a study wrote into its folder."""
    read_study(study)
    names = (STUDY, DATA, RUNS, REPORT, ".lock")
    return [study / name for name in names if (study / name).exists()]


def remove(study: Path, paths: list[Path]) -> None:
    """Remove these, and the study's folder if nothing is left in it.

    Raises `UserError`, before anything goes, while the study is being run.
    """
    runs = [study / path for path in read_study(study).runs]
    if any(is_held(folder / ".lock") for folder in (study, *runs)):
        raise UserError(f"{study}: the study is being run: wait for its end, or stop it")
    for path in paths:
        with explained(path):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    if not any(study.iterdir()):
        with explained(study):
            study.resolve().rmdir()  # "." has no name to be removed by


def as_dict(state: RunState) -> dict[str, Any]:
    return {name: value for name, value in vars(state).items() if value != "" or name == "run"}
