"""`site.yaml`: the keys that a site writes, converted and judged one by one, whatever the task."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from heterosync.data.unique_yaml import TextLoader
from heterosync.errors import UserError, closest, nearest

CONFIG = "site.yaml"
#: Values of `task` that make a site folder another kind than images with labels; any other words describe that one.
VOLUMES = "segmentation"
KINDS = (VOLUMES,)
Convert = Callable[[Any], Any]


@dataclass(frozen=True, kw_only=True)
class SiteKeys:
    """The keys that every kind of site folder has."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    batch_size: int | None = None  # overrides the job's batch size at this site
    split_seed: int = 0
    threads: int | None = None  # CPU threads of the trainer; None: all
    own: frozenset[str] = field(default=frozenset(), compare=False, repr=False)  # the keys that the file itself sets


def parse_keys(folder: Path | str, kind: type, convert: Mapping[str, Convert]) -> tuple[dict[str, Any], list[str]]:
    """The values in `<folder>/site.yaml` for the fields of the dataclass `kind`, and one line for each problem.

    A field without a default is required; what is absent or wrong has no value in the result. `convert` turns what
    YAML gives into a field's value and raises `ValueError`; without one a key is a text. The field `own` is no key.
    """
    try:
        given = _read_yaml(folder)
    except UserError as error:
        return {}, [str(error)]
    known = {item.name: item for item in fields(kind) if item.name != "own"}
    problems = [f"{CONFIG}: unknown key '{key}': {nearest(str(key), known)}" for key in given if key not in known]
    values: dict[str, Any] = {}
    for name, item in known.items():
        required = item.default is MISSING
        if name not in given or (not required and given[name] in ("", "null", "~")):
            if required:
                problems.append(f"{CONFIG}: the key '{name}' is missing: add it")
            continue
        try:
            values[name] = (CONVERT | dict(convert)).get(name, text)(given[name])
        except ValueError as error:
            problems.append(f"{CONFIG}: {name} = {given[name]!r}: {error}")
    columns = {name: values.get(name, known[name].default) for name in known if name.endswith("_column")}
    if len(set(columns.values())) < len(columns):
        problems.append(f"{CONFIG}: two of the column keys name the same column: give each its own")
        values = {name: value for name, value in values.items() if name not in columns}
    return values, problems


def read_task(folder: Path | str) -> str:
    """The key `task` alone; "" when it is absent or the file cannot be read."""
    try:
        task = _read_yaml(folder).get("task")
    except UserError:
        return ""
    return task.strip() if isinstance(task, str) else ""


def open_kind(folder: Path | str) -> str | None:
    """One line when `site.yaml` leaves open what kind of folder it is, so that nothing else can be judged: no keys can
    be read, or `task` is nearly the name of a kind and there are no labels of another one."""
    try:
        given = _read_yaml(folder)
    except UserError as error:
        return str(error) if (Path(folder) / CONFIG).exists() else None
    task = read_task(folder)
    meant = closest(task, KINDS)
    if task in KINDS or meant is None or "labels" in given:
        return None
    return f"{CONFIG}: task: {task}: did you mean '{meant}'? (a task of images with labels needs the key labels)"


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a text")
    return value.strip()


def whole(low: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if not isinstance(value, str) or not re.fullmatch(r"\d{1,9}", value) or int(value) < low:
            raise ValueError(f"expected a whole number of at least {low}")
        return int(value)

    return convert


def _device(value: Any) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text(value)):
        raise ValueError("expected auto, cpu, cuda, cuda:1 or mps")
    return text(value)


#: The keys that every site folder may have.
CONVERT: dict[str, Convert] = {
    "device": _device,
    "split_seed": whole(0),
    "threads": whole(1),
}


def _read_yaml(folder: Path | str) -> dict[Any, Any]:
    try:
        given = yaml.load((Path(folder) / CONFIG).read_text(encoding="utf-8-sig"), Loader=TextLoader)
    except FileNotFoundError:
        raise UserError(f"{CONFIG}: the file is missing: write it with the keys task and labels") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{CONFIG}: not readable ({type(error).__name__}): save it as UTF-8 text") from error
    except yaml.constructor.ConstructorError as error:
        assert error.problem_mark is not None
        raise UserError(f"{CONFIG} line {error.problem_mark.line + 1}: {error.problem}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{CONFIG}{where}: not valid YAML: write one 'key: value' per line") from error
    if not isinstance(given, dict):
        raise UserError(f"{CONFIG}: holds no keys: write one 'key: value' per line, at least task and labels")
    return given
