"""The runs of a cross-validation read back: what submodels and ensembles scored, their record and their cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from heterosync.errors import UserError
from heterosync.study.evidence.cross_site import CaseDice
from heterosync.study.evidence.outcomes import read_finished
from heterosync.study.evidence.runs import read_runs
from heterosync.study.evidence.views import views_of_study
from heterosync.study.layout import GLOBAL, PREDICTIONS, RESULTS, UNSEEN, VIEWS, Done, RunSpec, own_model
from heterosync.study.running.volume_plan import ENSEMBLE, FROM, part_of
from heterosync.study.scores import read_scores
from heterosync.training.views import View


@dataclass(frozen=True, eq=False)
class VolumeOutcome:
    """A finished run: a submodel, or an ensemble (`part`). label: the method's in the plan; scores: of its test cases,
    models named as in the report; personal: sites have models of their own; history, cost, info: as of
    `outcomes.Outcome`, an ensemble has no history and no info."""

    spec: RunSpec
    folder: Path
    scores: list[CaseDice]
    personal: bool
    history: list[tuple[int, str, str, float]]
    cost: dict[str, Any]
    info: dict[str, Any]

    @property
    def label(self) -> str:
        return part_of(self.spec.label)[0]

    @property
    def part(self) -> str:
        return part_of(self.spec.label)[1]

    def views(self, model: str) -> list[View]:
        """What an ensemble keeps of its test cases to look at, for one of its models."""
        own = model.removeprefix(self.label).strip()
        return views_of_study(self.folder / RESULTS / VIEWS, own_model(own) if own else GLOBAL)


@dataclass(frozen=True, eq=False)
class VolumeStudy:
    """plan: as study.json has it; outcomes: in the order of the plan; problems: a line for all that is missing; info:
    study.json."""

    folder: Path
    plan: dict[str, Any]
    outcomes: list[VolumeOutcome]
    problems: list[str]
    info: dict[str, Any]

    @cached_property
    def validations(self) -> list[CrossValidation]:
        """One per scenario and repeat, in the order of the plan."""
        found: dict[tuple[str, int], list[VolumeOutcome]] = {}
        for one in self.outcomes:
            found.setdefault((one.spec.scenario, one.spec.repeat), []).append(one)
        return [CrossValidation(*place, outcomes) for place, outcomes in found.items()]


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """All finished runs on the same volumes."""

    scenario: str
    repeat: int
    outcomes: list[VolumeOutcome]

    @property
    def name(self) -> str:
        return f"{self.scenario} r{self.repeat}"

    @property
    def submodels(self) -> list[VolumeOutcome]:
        return [one for one in self.outcomes if one.part != ENSEMBLE]

    @property
    def ensembles(self) -> list[VolumeOutcome]:
        return [one for one in self.outcomes if one.part == ENSEMBLE]

    @cached_property
    def scores(self) -> list[CaseDice]:
        """Of all ensembles."""
        return [score for one in self.ensembles for score in one.scores]

    @property
    def challenge(self) -> list[str]:
        return [UNSEEN] if any(score.site == UNSEEN for score in self.scores) else []


def read_volume_study(folder: Path | str) -> VolumeStudy:
    """Read every finished run of a study on volumes, whole or still going.

    Raises `UserError` when the folder is no study's or its study.json is damaged.
    """
    return VolumeStudy(**read_finished(folder, _read_run))


def _read_run(spec: RunSpec, folder: Path, done: Done) -> VolumeOutcome:
    results = folder / RESULTS
    rows = read_scores(results)
    keys = [(row.model, row.site, row.case) for row in rows]
    if len(set(keys)) < len(keys):
        model, site, case = next(key for key in keys if keys.count(key) > 1)
        raise UserError(f"{results / PREDICTIONS}: case '{case}' of {site} stands there twice for model {model}")
    label = part_of(spec.label)[0]
    scores = [replace(row, model=_name(label, row.model)) for row in rows]
    personal = any(row.model != GLOBAL for row in rows)
    if ENSEMBLE in spec.settings:
        _same_cases(results, rows)
        return VolumeOutcome(spec, folder, scores, personal, [], asdict(done), {})
    record = read_runs([results])[0]
    info = record.info
    if FROM in spec.settings:  # in place of a path on the machine that trained
        source = part_of(Path(spec.settings[FROM]).name)[0]
        told = {"weights": f"the best model of {source} in the same fold"}
        info = {**info, "training": {**(info.get("training") or {}), **told}}
    for site, metrics in record.test_metrics.items():
        have = sum(row.site == site for row in rows)
        if have != metrics.get("n"):
            raise UserError(
                f"{results / PREDICTIONS} has {have} cases of {site}, but the run tested {metrics.get('n'):g}: the file"
                f" is truncated or not this run's; remove {folder}, and it is run again"
            )
    return VolumeOutcome(spec, folder, scores, personal, record.history, asdict(done), info)


def _same_cases(results: Path, rows: list[CaseDice]) -> None:
    cases: dict[str, set[tuple[str, str]]] = {}
    for row in rows:
        cases.setdefault(row.model, set()).add((row.site, row.case))
    if len({frozenset(of_model) for of_model in cases.values()}) > 1:
        raise UserError(
            f"{results / PREDICTIONS}: its models were not tested on the same cases: remove {results.parent}, and it is"
            " run again"
        )


def _name(label: str, model: str) -> str:
    """What a report calls a model: the label of its method, with the site's name for a site's own one."""
    return label if model == GLOBAL else f"{label} {model.removeprefix('site:')}"
