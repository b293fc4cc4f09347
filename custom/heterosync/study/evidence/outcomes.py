"""The runs of a study read back: what every model scored, its record and its cost. What is missing or damaged is named
and left out; the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from sys import intern
from typing import Any, Protocol, TypeVar

import numpy as np

from heterosync.errors import UserError
from heterosync.files import read_json
from heterosync.study.evidence.runs import read_runs
from heterosync.study.evidence.statistics import Scores
from heterosync.study.layout import (
    FAILED,
    GLOBAL,
    PREDICTIONS,
    RESULTS,
    RUN_SPEC,
    RUNS,
    STUDY,
    UNSEEN,
    Done,
    Prediction,
    RunSpec,
    own_model,
    read_done,
    read_predictions,
    read_spec,
)


@dataclass(frozen=True, eq=False)
class Outcome:
    """A finished run.

    scores: site -> its test cases, scored by the model that speaks for the run; unseen: model -> the cases of the
    population that no site trains on (the model `best`, or `site:<name>` for each site's own); personal: sites have
    models of their own; tests: site -> metric -> value as the run recorded it; history: (round, site, metric, value);
    cost: the fields of `layout.Done`; info: run.json.
    """

    spec: RunSpec
    folder: Path
    scores: dict[str, Scores]
    unseen: dict[str, Scores]
    personal: bool
    tests: dict[str, dict[str, Any]]
    history: list[tuple[int, str, str, float]]
    cost: dict[str, Any]
    info: dict[str, Any]

    @property
    def label(self) -> str:
        return self.spec.label


class AnyOutcome(Protocol):
    """What every finished run has, whatever it learned. label: of its method in the plan."""

    @property
    def spec(self) -> RunSpec: ...
    @property
    def label(self) -> str: ...
    @property
    def history(self) -> list[tuple[int, str, str, float]]: ...
    @property
    def cost(self) -> dict[str, Any]: ...
    @property
    def info(self) -> dict[str, Any]: ...


@dataclass(frozen=True, eq=False)
class Study:
    """plan: as study.json has it; outcomes: in the order of the plan; problems: a line for all that is missing; info:
    study.json, with digest and versions."""

    folder: Path
    plan: dict[str, Any]
    outcomes: list[Outcome]
    problems: list[str]
    info: dict[str, Any]


def read_study(folder: Path | str) -> Study:
    """Read every finished run of a study on pictures, whole or still going.

    Raises `UserError` when the folder is no study's or its study.json is damaged.
    """
    return Study(**read_finished(folder, _read_run))


R = TypeVar("R")


def read_finished(folder: Path | str, read: Callable[[RunSpec, Path, Done], R]) -> dict[str, Any]:
    """The fields of a `Study`, each outcome made by `read` of a finished run's spec, folder and cost.

    Raises `UserError` when the folder is no study's or its study.json is damaged.
    """
    folder = Path(folder)
    path = folder / STUDY
    if not path.is_file():
        raise UserError(f"{folder} holds no {STUDY}: name the folder that `heterosync study run` was given as --out")
    info = read_json(path)
    runs = _planned(path, info)
    outcomes, problems = [], []
    waiting: dict[str, list[str]] = {}  # what a method did at a level -> repeats without a result
    for run, digest in runs.items():
        _, scenario, level, repeat, label = run.split("/")
        name = RunSpec(scenario, level, 0, "", "", label).name.replace(" r0 ", " ")
        try:
            finished = _finished(folder / run, run, digest)
            outcome = read(finished[0], folder / run, finished[1]) if finished else None
        except UserError as error:
            problems += [f"{name} {repeat} left out: {line}" for line in _first_lines(str(error))]
            continue
        if outcome is not None:
            outcomes.append(outcome)
        else:
            waiting.setdefault(name, []).append(repeat)
    problems += [
        f"{name}: no result yet for {', '.join(repeats)}: `heterosync study run` goes on with what is missing"
        for name, repeats in waiting.items()
    ]
    problems += _strangers(folder, runs)
    return {"folder": folder, "plan": info["plan"], "outcomes": outcomes, "problems": problems, "info": info}


def _planned(path: Path, info: Any) -> dict[str, str]:
    """Path of each run below the study -> digest."""
    again = "run `heterosync study run` again with the same plan"
    if not isinstance(info, dict) or not isinstance(info.get("plan"), dict) or not isinstance(info.get("runs"), dict):
        raise UserError(f"{path} is damaged, it must hold the tables plan and runs: {again}")
    for run in info["runs"]:
        if len(parts := run.split("/")) != 5 or parts[0] != RUNS:
            raise UserError(f"{path} is damaged, '{run}' is no path of a run: {again}")
    return info["runs"]


def _finished(folder: Path, run: str, digest: str) -> tuple[RunSpec, Done] | None:
    """None when the run has not ended. Raises `UserError` when it failed, is damaged or belongs to another plan."""
    done = read_done(folder)
    if done is None:
        if (folder / FAILED).exists():
            failed = read_json(folder / FAILED)
            cause = failed.get("cause") if isinstance(failed, dict) else None
            raise UserError(f"it failed: {cause or f'see {folder / FAILED}'}")
        return None
    spec = read_spec(folder)
    if spec.folder("").as_posix() != run or spec.digest != digest or done.digest != digest:
        raise UserError(f"{folder} holds a run of another plan: remove it, and it is run again")
    return spec, done


def _read_run(spec: RunSpec, folder: Path, done: Done) -> Outcome:
    """Raises `UserError` where its results are missing or damaged."""
    results = folder / RESULTS
    record = read_runs([results])[0]
    predictions = read_predictions(results)
    if done.rows is not None and len(predictions) != done.rows:
        raise UserError(
            f"{results / PREDICTIONS} has {len(predictions)} rows, the run wrote {done.rows}: the file is truncated or"
            f" not this run's; remove {folder}, and it is run again"
        )
    scores, unseen, personal = _by_model(results / PREDICTIONS, predictions)
    for site, metrics in record.test_metrics.items():
        expected = {name: metrics[name] for name in ("n", "n_positive") if metrics.get(name) is not None}
        have = scores.get(site)
        counts = {"n": len(have), "n_positive": int(have.labels.sum())} if have else {"n": 0, "n_positive": 0}
        if any(counts[name] != value for name, value in expected.items()):
            was = ", ".join(f"{name} {value}" for name, value in expected.items())
            raise UserError(
                f"{results / PREDICTIONS} has {counts['n']} cases of {site}, {counts['n_positive']} positive, but the"
                f" run tested {was}: the file is truncated or not this run's; remove {folder}, and it is run again"
            )
    return Outcome(
        spec, folder, scores, unseen, personal, record.test_metrics, record.history, asdict(done), record.info
    )


def _by_model(path: Path, rows: Sequence[Prediction]) -> tuple[dict[str, Scores], dict[str, Scores], bool]:
    """Site -> scores, model -> scores of the unseen population, and whether sites have models of their own."""
    groups: dict[tuple[str, str], list[Prediction]] = {}
    for row in rows:
        groups.setdefault((row.site, row.model), []).append(row)
    scores: dict[str, Scores] = {}
    unseen: dict[str, Scores] = {}
    for (site, model), cases in groups.items():
        ids = [case.id for case in cases]
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            raise UserError(f"{path}: case '{twice}' of {site} stands there twice for model {model}: restore the file")
        if site == UNSEEN:
            unseen[model] = _scores(cases)
        elif site in scores:
            raise UserError(f"{path}: site {site} is scored by more than one model: restore the file")
        else:
            scores[site] = _scores(cases)
    personal = any(model != GLOBAL for _, model in groups)
    known = {own_model(site) for site in scores} if personal else {GLOBAL}
    if strange := sorted({model for _, model in groups} - known):
        raise UserError(
            f"{path}: model '{strange[0]}' is none of this run ({', '.join(sorted(known))}): restore the file"
        )
    return scores, unseen, personal


def _scores(cases: Sequence[Prediction]) -> Scores:
    return Scores(
        ids=np.array([intern(case.id) for case in cases], dtype=object),  # shared by all runs: studies hold millions
        patients=np.array([intern(case.patient) for case in cases], dtype=object),
        labels=np.array([case.label for case in cases]),
        scores=np.array([case.probability for case in cases]),
    )


def _strangers(study: Path, runs: Mapping[str, str]) -> list[str]:
    """Run folders that the plan does not know."""
    found = sorted(path.parent for path in (study / RUNS).glob(f"*/*/*/*/{RUN_SPEC}"))
    return [f"{path} is of another plan: left out" for path in found if path.relative_to(study).as_posix() not in runs]


def _first_lines(text: str, most: int = 3) -> list[str]:
    lines = text.splitlines()
    return lines if len(lines) <= most else [*lines[:most], f"and {len(lines) - most} more such lines"]


def by_series(study: Study) -> dict[tuple[str, str], dict[str, dict[int, Outcome]]]:
    """(scenario, level) -> label -> repeat -> outcome, in the order of the plan."""
    found: dict[tuple[str, str], dict[str, dict[int, Outcome]]] = {}
    for outcome in study.outcomes:
        spec = outcome.spec
        found.setdefault((spec.scenario, spec.level), {}).setdefault(spec.label, {})[spec.repeat] = outcome
    return found


def models_at(outcomes: Mapping[int, Outcome], site: str) -> list[dict[int, Scores]]:
    """The models that speak for a method at a site, each as repeat -> scores: one; for the unseen population every
    site's own model where the method has no global one. Empty where the site was not tested."""
    if site != UNSEEN:
        tested = {repeat: one.scores[site] for repeat, one in outcomes.items() if site in one.scores}
        return [tested] if tested else []
    names = sorted({model for one in outcomes.values() for model in one.unseen})
    return [{repeat: one.unseen[name] for repeat, one in outcomes.items() if name in one.unseen} for name in names]


def sites_of(outcomes: Mapping[str, Mapping[int, Outcome]]) -> list[str]:
    """Every tested site of a scenario in the order of its files, the unseen population last."""
    each = [one for of_label in outcomes.values() for one in of_label.values()]
    sites = dict.fromkeys(site for one in each for site in one.scores)
    return [*sites, *([UNSEEN] if any(one.unseen for one in each) else [])]
