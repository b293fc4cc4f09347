"""Plan files: YAML, read with every problem named at once. The presets are such files (study/running/plans)."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from heterosync.data.anchor_controls import CONTROLS
from heterosync.data.scenario_tables import read_table, table_levels
from heterosync.data.unique_yaml import PlainLoader
from heterosync.errors import UserError, closest, nearest
from heterosync.study.running.plan import BOTH, KEEP, SYNTHETIC, AnyPlan, Plan, ScenarioEntry
from heterosync.study.running.plan_reader import PlanReader, whole_number
from heterosync.study.running.volume_plan_file import VolumePlanReader
from heterosync.training import CLASSIFICATION, SEGMENTATION

PRESETS = Path(__file__).parent / "plans"
#: The letters that the paper's scenarios have in docs/study.md.
LETTERS = {"A": "feature-skew", "B": "label-skew", "C": "quantity-skew", "D": "combined", "E": "hospitals"}
_COLUMNS = ("image_column", "label_column", "patient_column", "domain_column")
SOURCE_KEYS = ("path", "kind", "negative", "positive", *_COLUMNS)
SYNTHETIC_KEYS = ("kind", "image_size", "visibility", "noise", "variation")
ANCHOR_KEYS = {
    "synthetic": ("kind", "per_class", "control"),
    "table": ("table", "sources", "size", "control"),
    "source": (*SOURCE_KEYS, "per_class", "control"),
}


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def read_plan(plan: Path | str, engine: str | None = None) -> AnyPlan:
    """Read a plan file, or the preset of that name; `engine` replaces the plan's.

    Raises `UserError` for a file that is no such table, `ProblemList` with everything that is wrong in it.
    """
    path = PRESETS / f"{plan}.yaml" if str(plan) in preset_names() else Path(plan)
    if not path.is_file():
        beside = {file.stem: file for file in path.parent.glob("*.y*ml")}
        near = closest(path.stem, beside)
        hint = f"did you mean '{beside[near]}'? presets: {', '.join(preset_names())}" if near else None
        raise UserError(f"'{plan}' is neither a plan file nor a preset; {hint or nearest(str(plan), preset_names())}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=PlainLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path} line {mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not readable YAML ({getattr(error, 'problem', 'not UTF-8')}): correct it") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: a plan is a table (methods: …, scenarios: …): see docs/study.md")
    base = Path.cwd() if path.parent == PRESETS else path.parent.absolute()
    task = values.get("task", CLASSIFICATION.name)
    if task not in READERS:
        raise UserError(f"{path}: task is '{task}': {nearest(str(task), READERS)}")
    return READERS[task](path, values, base, engine).plan()


class PicturePlanReader(PlanReader):
    """Reads a plan for methods of classification."""

    def plan(self) -> Plan:
        given = self.values
        self._keys("the plan", given, ({item.name for item in fields(Plan)} | {"repeats", "seed", "task"}) - {"base"})
        source = self._source(given.get("source", SYNTHETIC))
        plan = Plan(
            name=self._name(),
            methods=self._listed("methods", self._method),
            scenarios=self._listed("scenarios", self._scenario),
            source=source,
            anchor=self._anchor("anchor", given.get("anchor", SYNTHETIC if source.get("kind") == SYNTHETIC else None)),
            seeds=self._seeds(given.get("repeats"), given.get("seed"), given.get("seeds")),
            scale=self._scale("scale", given.get("scale", 1.0)),
            training=self._table("training", given.get("training")),
            engine=self._engine(),
            match_steps=self._choice("match_steps", given.get("match_steps", False), (False, True, BOTH)),
            balanced_sampler=self._choice("balanced_sampler", given.get("balanced_sampler", True), (True, False, BOTH)),
            group=self._choice("group", given.get("group", "patient"), ("patient", "image")),
            unseen=self._choice("unseen", given.get("unseen", True), (True, False)),
            keep=self._keep(given.get("keep", ["best", "last"]), KEEP),
            base=str(self.base),
        )
        self.checked(plan.contradictions)
        return plan

    # -- entries of the lists ------------------------------------------------------------------------------------------

    def _scenario(self, value: Any) -> ScenarioEntry:
        table = {"scenario": value} if isinstance(value, str) else self._table("scenarios", value)
        self._keys("scenarios", table, [item.name for item in fields(ScenarioEntry)])
        given = str(table.get("scenario", ""))
        given = LETTERS.get(given, given)
        scenario = str(self.base / given) if (self.base / given).is_file() else given
        known, levels = table_levels(scenario), table.get("levels", "all")
        chosen = None if levels == "all" else tuple(map(str, levels if isinstance(levels, list) else [levels]))
        for level in chosen or ():
            if not known:
                raise UserError(f"scenario {given} has no levels: leave out levels")
            if level not in known:
                raise UserError(f"scenario {given} has no level '{level}': {nearest(level, known)}")
            if chosen is not None and chosen.count(level) > 1:
                raise UserError(f"scenario {given}: level {level} is named twice: leave one out")
        for one in chosen or known or (None,):
            read_table(scenario, one)  # every bad line is told
        name, methods = str(table.get("name") or Path(given).stem), table.get("methods")
        scale, any_domain = table.get("scale"), table.get("any_domain", False)
        return ScenarioEntry(
            scenario=given,
            name=self._folder_name("scenario name", name),
            levels=chosen,
            methods=None if methods is None else tuple(map(str, methods if isinstance(methods, list) else [methods])),
            scale=None if scale is None else self._scale(f"scenario {name}, scale", scale),
            anchor=self._anchor(f"scenario {name}, anchor", table.get("anchor")),
            any_domain=self._choice(f"scenario {name}, any_domain", any_domain, (True, False)),
        )

    # -- data ----------------------------------------------------------------------------------------------------------

    def _source(self, value: Any) -> dict[str, Any]:
        if value == SYNTHETIC:
            return {"kind": SYNTHETIC}
        table = self._table("source", {"path": value} if isinstance(value, str) else value)
        synthetic = table.get("kind") == SYNTHETIC
        self._keys("source", table, SYNTHETIC_KEYS if synthetic else SOURCE_KEYS)
        if not synthetic and not isinstance(table.get("path"), str):
            self.problems.append("source names no path: write path: …, or source: synthetic")
        return {"kind": None, **table}

    def _anchor(self, key: str, value: Any) -> dict[str, Any] | None:
        if value is None:
            return None
        if value == SYNTHETIC:
            return {"kind": SYNTHETIC}
        if isinstance(value, str):
            return {"kind": "pack", "path": value}
        table = self._table(key, value)
        kind = "table" if "table" in table else SYNTHETIC if table.get("kind") == SYNTHETIC else "source"
        self._keys(key, table, ANCHOR_KEYS[kind])
        if kind == "source" and not isinstance(table.get("path"), str):
            self.problems.append(f"{key} names no path: write synthetic, a pack's path, or path: … of a source")
        if "control" in table:
            self._choice(f"{key}, control", table["control"], tuple(CONTROLS))
        per_class = table.get("per_class", 1)
        if not whole_number(per_class) or per_class < 1:
            self.problems.append(f"{key}, per_class is {per_class!r}: it must be a whole number from 1")
        return {**table, "kind": kind, **({"format": table["kind"]} if kind == "source" and "kind" in table else {})}


#: Task of a plan -> what reads it.
READERS: dict[str, type[PicturePlanReader] | type[VolumePlanReader]] = {
    CLASSIFICATION.name: PicturePlanReader,
    SEGMENTATION.name: VolumePlanReader,
}
