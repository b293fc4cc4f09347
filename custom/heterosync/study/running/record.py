"""study.json: what a study is, written before its first run, and how far its runs have come."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterosync.errors import UserError, nearest
from heterosync.federation.checkin import versions
from heterosync.federation.trainings import difference, learning_info
from heterosync.files import read_json, write_json
from heterosync.study.layout import RUN_SPEC, RUNS, STUDY, RunSpec, level_folder
from heterosync.study.running.kinds import AnyCell, plan_of
from heterosync.study.running.plan import AnyPlan, digest_of


@dataclass(frozen=True)
class StudyRecord:
    """What study.json says. runs: path below the study -> digest, in the order in which they are made."""

    plan: AnyPlan
    digest: str
    runs: dict[str, str]


def write_study(study: Path, plan: AnyPlan, specs: list[RunSpec], cells: Sequence[AnyCell]) -> None:
    """Raises `UserError` when runs of another plan stand in `study`; a plan may grow."""
    check_same(study, plan, specs)
    runs = {spec.folder(study).relative_to(study).as_posix(): spec.digest for spec in specs}
    values = {
        "name": plan.name,
        "digest": digest_of(runs),
        "plan": plan.to_dict(),
        "engine": plan.engine,
        "seeds": list(plan.seeds),
        "source": plan.where_from(),
        "versions": dict(versions()),
        "runs": runs,
        "cells": [
            {"scenario": cell.scenario, "level": level_folder(cell.level), "repeat": cell.repeat, "seed": cell.seed}
            | {"sites": {site: list(cell.images(site)) for site in cell.sites}}
            for cell in cells
        ],
    }
    write_json(study / STUDY, values)


def check_same(study: Path, plan: AnyPlan, specs: list[RunSpec]) -> None:
    """Raise `UserError` when `study` holds anything that this plan would not have made."""
    strange = [path for path in study.iterdir() if path.name != ".lock"] if study.is_dir() else []
    if strange and not (study / STUDY).exists():
        raise UserError(f"{study} holds files that are not of a study: choose another --out")
    known = {spec.folder(study): spec for spec in specs}
    for path in sorted((study / RUNS).glob(f"*/*/*/*/{RUN_SPEC}")):
        mine, there = known.get(path.parent), read_json(path)
        if mine is None or mine.digest != there.get("digest"):
            name = path.parent.relative_to(study / RUNS).as_posix()
            what = "is not in this plan" if mine is None else f"has {_other(study, plan, mine, there)}"
            raise UserError(f"{study} is the folder of another plan: its run {name} {what}: choose another --out")


def _other(study: Path, plan: AnyPlan, mine: RunSpec, there: dict[str, Any]) -> str:
    """In words, what makes the run in run_spec.json another one than `mine`."""
    found = None
    with suppress(UserError, KeyError, TypeError, ValueError):  # of another version, or damaged
        ours, theirs = (
            learning_info(mine.method, s["method"], s["training"]) for s in (mine.settings, there["settings"])
        )
        found = difference(ours, theirs, free=())
        if found is None:
            ours, theirs = (p.ground(mine.scenario) for p in (plan, plan_of(read_json(study / STUDY)["plan"])))
            found = difference(ours, theirs, free=())
    return f"another {found}" if found else "other settings or images"


def read_study(study: Path) -> StudyRecord:
    """Raises `UserError` when `study` is not the folder of a study."""
    if not (study / STUDY).is_file():
        raise UserError(f"{study} is not the folder of a study (no {STUDY}): start one with `heterosync study run`")
    values = read_json(study / STUDY)
    try:
        return StudyRecord(plan_of(values["plan"]), values["digest"], dict(values["runs"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{study / STUDY} is damaged ({error}): run the study's plan again to write it anew") from error


def run_folder(study: Path, run: str) -> Path:
    """The folder of the run `run`, its path below `runs/`. Raises `UserError` with the nearest one."""
    known = {path.removeprefix(f"{RUNS}/"): path for path in read_study(study).runs}
    name = run.strip("/").removeprefix(f"{RUNS}/")
    if name not in known:
        raise UserError(f"{study} has no run '{run}': {nearest(name, known)}")
    return study / known[name]
