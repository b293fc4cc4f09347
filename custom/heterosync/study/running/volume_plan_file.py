"""Plan files of studies on volumes (docs/prostate.md)."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from heterosync.study.running.plan_reader import PlanReader, whole_number
from heterosync.study.running.volume_plan import KEEP, PHANTOMS, SITES, VolumePlan

CASES, FIELD_OF_VIEW = 10, 96.0  # of the phantoms [own]: a prostate with what lies around it


class VolumePlanReader(PlanReader):
    """Reads a plan for methods of segmentation."""

    def plan(self) -> VolumePlan:
        given = self.values
        known = {item.name for item in fields(VolumePlan)} | {"repeats", "seed", "task"}
        self._keys("the plan", given, known - {"base"})
        plan = VolumePlan(
            name=self._name(),
            methods=self._listed("methods", self._method),
            source=self._source(given.get("source", PHANTOMS)),
            seeds=self._seeds(given.get("repeats"), given.get("seed"), given.get("seeds")),
            folds=self._whole("folds", given.get("folds", 5), 2),
            training=self._table("training", given.get("training")),
            engine=self._engine(),
            keep=self._keep(given.get("keep", []), KEEP),
            base=str(self.base),
        )
        self.checked(plan.contradictions)
        return plan

    def _source(self, value: Any) -> dict[str, Any]:
        if value == PHANTOMS:
            return {"kind": PHANTOMS, "cases": CASES, "field_of_view": FIELD_OF_VIEW}
        table = self._table("source", value)
        if table.get("kind") == PHANTOMS:
            self._keys("source", table, ("kind", "cases", "field_of_view"))
            cases = self._whole("source, cases", table.get("cases", CASES), 1)
            size = self._scale("source, field_of_view", table.get("field_of_view", FIELD_OF_VIEW))
            return {"kind": PHANTOMS, "cases": cases, "field_of_view": size}
        self._keys("source", table, (SITES, "challenge"))
        sites, challenge = self._table("source, sites", table.get(SITES)), table.get("challenge")
        if not sites:
            self.problems.append("source names no sites: write sites: {name: folder, …}, or source: phantoms")
        if challenge is not None and not isinstance(challenge, str):
            self.problems.append(f"source, challenge is {challenge!r}: it must be the folder of a test-only site")
        return {"kind": SITES, "sites": {str(name): str(path) for name, path in sites.items()}, "challenge": challenge}

    def _whole(self, key: str, value: Any, least: int) -> int:
        if not whole_number(value) or value < least:
            self.problems.append(f"{key} is {value!r}: it must be a whole number from {least}")
            return least
        return int(value)
