"""What the readers of all plan files share: taking a table apart while every problem is noted."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from heterosync.errors import ProblemList, UserError, nearest
from heterosync.methods import get_method
from heterosync.study.running.plan import ENGINES, MethodEntry

_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class PlanReader:
    """Takes a plan apart and notes every problem on the way. path: of the plan, for its name and for messages; base:
    what its paths are relative to; engine: in place of the plan's."""

    def __init__(self, path: Path, values: dict[str, Any], base: Path, engine: str | None = None):
        self.path, self.values, self.base = path, values, base
        self._engine_wanted = engine
        self.problems: list[str] = []

    def checked(self, contradictions: Callable[[], list[str]]) -> None:
        """Raise `ProblemList` with everything that is wrong; `contradictions` counts once the plan can be read."""
        self.problems += [] if self.problems else contradictions()
        if self.problems:
            raise ProblemList([f"{self.path}: {problem}" for problem in dict.fromkeys(self.problems)])

    def _name(self) -> str:
        return self._folder_name("name", str(self.values.get("name") or self.path.stem))

    def _engine(self) -> str:
        return str(self._choice("engine", self._engine_wanted or self.values.get("engine", ENGINES[0]), ENGINES))

    def _method(self, value: Any) -> MethodEntry:
        table = {"method": value} if isinstance(value, str) else self._table("methods", value)
        self._keys("methods", table, [item.name for item in fields(MethodEntry)])
        name = str(table.get("method", ""))
        get_method(name)
        variant = str(table.get("variant") or "")
        return MethodEntry(
            name,
            self._folder_name(f"method {name}, variant", variant) if variant else "",
            self._table(f"method {name}, settings", table.get("settings")),
            self._table(f"method {name}, training", table.get("training")),
        )

    def _listed(self, key: str, read: Callable[[Any], Any]) -> tuple[Any, ...]:
        values, found = self.values.get(key), []
        if not isinstance(values, list) or not values:
            self.problems.append(f"{key} must be a list with at least one entry")
            return ()
        for value in values:
            try:
                found.append(read(value))
            except UserError as error:
                self.problems += str(error).splitlines()
        return tuple(found)

    def _seeds(self, repeats: Any, seed: Any, seeds: Any) -> tuple[int, ...]:
        if seeds is not None:
            if repeats is not None or seed is not None:
                self.problems.append("seeds has one number per repeat: leave out repeats and seed, or seeds")
            whole = isinstance(seeds, list) and seeds and all(map(whole_number, seeds))
            if not whole or len(set(seeds)) < len(seeds):
                self.problems.append(f"seeds is {seeds!r}: it must be a list of different whole numbers from 0")
                return (0,)
            return tuple(seeds)
        repeats, seed = 1 if repeats is None else repeats, 0 if seed is None else seed
        if not whole_number(repeats) or repeats < 1:
            self.problems.append(f"repeats is {repeats!r}: it must be a whole number from 1")
            repeats = 1
        if not whole_number(seed):
            self.problems.append(f"seed is {seed!r}: it must be a whole number from 0")
            seed = 0
        return tuple(range(seed, seed + repeats))

    def _keep(self, value: Any, known: tuple[str, ...]) -> tuple[str, ...]:
        if not isinstance(value, list):
            self.problems.append(f"keep is {value!r}: it must be a list of {', '.join(known)}")
            return ()
        return tuple(self._choice("keep", item, known) for item in value)

    def _scale(self, key: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            self.problems.append(f"{key} is {value!r}: it must be a number above 0")
            return 1.0
        return float(value)

    def _choice(self, key: str, value: Any, choices: tuple[Any, ...]) -> Any:
        if not any(value == choice and type(value) is type(choice) for choice in choices):
            words = [str(choice).lower() for choice in choices]
            self.problems.append(f"{key} is '{value}': {nearest(str(value).lower(), words)}")
        return value

    def _folder_name(self, key: str, value: str) -> str:
        if not _FOLDER.fullmatch(value):
            self.problems.append(f"{key} '{value}': use letters, digits, '-', '_' and '.'")
        return value

    def _table(self, key: str, value: Any) -> dict[str, Any]:
        if value is not None and not isinstance(value, dict):
            self.problems.append(f"{key}: {value!r} is not a table (key: value)")
            return {}
        return dict(value or {})

    def _keys(self, where: str, table: Mapping[str, Any], known: Collection[str]) -> None:
        for name in table:
            if name not in known:
                self.problems.append(f"{where} has a key '{name}' that is not known: {nearest(str(name), known)}")


def whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
