"""Kinds of studies, by what the methods of a plan learn: how each lays out its data and carries out its runs.

To add a kind: a plan class, a data class with cells, a function that carries out a run, and a line in `KINDS`; its
plan files need a line in plan_file.py, its report one in pages/reports.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from heterosync.study.layout import RunSpec
from heterosync.study.running.cells import StudyData
from heterosync.study.running.job import Cost, Job
from heterosync.study.running.picture_runs import carry_out as carry_out_pictures
from heterosync.study.running.plan import AnyPlan, MethodEntry, Plan
from heterosync.study.running.plan import plan_of as picture_plan_of
from heterosync.study.running.volume_cells import VolumeData
from heterosync.study.running.volume_plan import VolumePlan, volume_plan_of
from heterosync.study.running.volume_runs import carry_out as carry_out_volumes
from heterosync.training import CLASSIFICATION


class AnyCell(Protocol):
    """The data that some runs of a study share: a folder of site folders. level: None where there are none."""

    @property
    def scenario(self) -> str: ...
    @property
    def level(self) -> str | None: ...
    @property
    def repeat(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def sites(self) -> list[str]: ...

    def folder(self, study: Path | str) -> Path: ...

    def images(self, site: str) -> tuple[int, int, int]:
        """How many train, validate and test."""

    def items(self, entry: MethodEntry, spec: RunSpec) -> float:
        """What a run takes in all, counted in items of training steps."""


class AnyData(Protocol):
    """All data of a plan and the runs on them. timed: items in the batch that is timed for an estimate."""

    timed: int

    @property
    def plan(self) -> AnyPlan: ...
    @property
    def cells(self) -> Sequence[AnyCell]: ...

    def runs(self) -> Sequence[tuple[AnyCell, MethodEntry, RunSpec]]: ...
    def waits_for(self, spec: RunSpec) -> set[str]: ...
    def overview(self) -> tuple[list[str], list[list[str]]]: ...
    def problems(self, study: Path) -> list[str]: ...
    def is_written(self, cell: Any, study: Path) -> bool: ...
    def write(self, cell: Any, study: Path) -> Path: ...


@dataclass(frozen=True)
class Kind:
    """plan_of: reads back what `to_dict` of a plan wrote; data: lays a plan out; carry_out: trains and tests."""

    plan_of: Callable[[Mapping[str, Any]], AnyPlan]
    data: Callable[[Any], AnyData]
    carry_out: Callable[[Job], Cost]


KINDS = {
    Plan.task: Kind(picture_plan_of, StudyData, carry_out_pictures),
    VolumePlan.task: Kind(volume_plan_of, VolumeData, carry_out_volumes),
}


def plan_of(values: Mapping[str, Any]) -> AnyPlan:
    """The plan that its `to_dict` wrote; one without a task is of classification. Raises `KeyError` for another."""
    return KINDS[values.get("task", CLASSIFICATION.name)].plan_of(values)
