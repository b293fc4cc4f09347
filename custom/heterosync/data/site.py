"""What a hospital writes about its data: `site.yaml` and `manifest.csv`, read into objects."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from heterosync.data.tables import read_csv
from heterosync.errors import ProblemList, UserError, nearest

CONFIG = "site.yaml"
MANIFEST = "manifest.csv"
SPLITS = ("train", "validation", "test")

# Headers that say what a column is although it has another name: ignoring such a column would put images of one patient
# into several splits, or draw new splits in place of those given.
LOOKS_LIKE = {
    "patient_column": ("patient", "patient_id", "patientid", "pid", "subject"),
    "split_column": ("split", "fold", "set"),
}


@dataclass(frozen=True)
class SiteConfig:
    """The keys of `site.yaml`; `task` and `labels` are required, all others have these defaults."""

    task: str  # what the images are for, in words; stays at the site
    labels: tuple[str, str]  # the negative and the positive label, as the manifest writes them
    image_column: str = "image"
    label_column: str = "label"
    patient_column: str = "patient"  # may be absent from the manifest; then every image is its own patient
    split_column: str = "split"  # may be absent from the manifest; then heterosync draws 60/10/30 once
    window: tuple[float, float] | None = None  # centre and width for images of more than 8 bits; None: the file's own
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    batch_size: int | None = None  # overrides the job's batch size at this site
    split_seed: int = 0
    threads: int | None = None  # CPU threads of the trainer; None: all
    own: frozenset[str] = field(default=frozenset(), compare=False, repr=False)  # the keys that the file itself sets


@dataclass(frozen=True)
class Row:
    """One row of the manifest; `line` counts the header as 1, as a spreadsheet shows it."""

    line: int
    image: str
    label: int
    patient: str | None
    split: str | None


# ---------------------------------------------------------------------------------------------------------- site.yaml


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a text")
    return value.strip()


def _labels(value: Any) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("expected two names, the negative one first, as [normal, abnormal]")
    negative, positive = map(_text, value)
    if negative == positive:
        raise ValueError("the two labels must differ")
    return negative, positive


def _whole(low: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if not isinstance(value, str) or not re.fullmatch(r"\d{1,9}", value) or int(value) < low:
            raise ValueError(f"expected a whole number of at least {low}")
        return int(value)

    return convert


def _window(value: Any) -> tuple[float, float]:
    try:
        centre, width = (float(part) for part in value)
        if not (abs(centre) < 1e9 and 1 < width < 1e9):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError("expected centre and width with a width above 1, as [40, 400]") from None
    return centre, width


def _device(value: Any) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", _text(value)):
        raise ValueError("expected auto, cpu, cuda, cuda:1 or mps")
    return _text(value)


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "labels": _labels,
    "window": _window,
    "device": _device,
    "batch_size": _whole(2),  # BatchNorm needs two images in a batch
    "split_seed": _whole(0),
    "threads": _whole(1),
}


def read_site_config(folder: Path | str) -> SiteConfig:
    """Read `<folder>/site.yaml`. Raises `ProblemList` with every missing, unknown or wrong key."""
    config, problems = parse_site_config(folder)
    if problems:
        raise ProblemList(problems)
    return config


def parse_site_config(folder: Path | str) -> tuple[SiteConfig, list[str]]:
    """What could be read of `<folder>/site.yaml`, and one line for each problem; what is wrong has its default, wrong
    labels are two empty names."""
    try:
        given = _read_yaml(folder)
    except UserError as error:
        return SiteConfig("", ("", "")), [str(error)]
    known = {item.name: item for item in fields(SiteConfig) if item.name != "own"}
    problems = [f"{CONFIG}: unknown key '{key}': {nearest(str(key), known)}" for key in given if key not in known]
    values: dict[str, Any] = {}
    for name, item in known.items():
        required = item.default is MISSING
        if name not in given or (not required and given[name] in ("", "null", "~")):
            if required:
                problems.append(f"{CONFIG}: the key '{name}' is missing: add it")
            continue
        try:
            values[name] = _CONVERT.get(name, _text)(given[name])
        except ValueError as error:
            problems.append(f"{CONFIG}: {name} = {given[name]!r}: {error}")
    columns = {name: values.get(name, known[name].default) for name in known if name.endswith("_column")}
    if len(set(columns.values())) < len(columns):
        problems.append(f"{CONFIG}: two of the column keys name the same column: give each its own")
        values = {name: value for name, value in values.items() if name not in columns}
    return SiteConfig(**{"task": "", "labels": ("", ""), **values}, own=frozenset(values)), problems


def _read_yaml(folder: Path | str) -> dict[Any, Any]:
    try:
        # BaseLoader keeps every scalar as text: YAML would read the labels [no, yes] as booleans and [0, 1] as numbers
        given = yaml.load((Path(folder) / CONFIG).read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except FileNotFoundError:
        raise UserError(f"{CONFIG}: the file is missing: write it with the keys task and labels") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{CONFIG}: not readable ({type(error).__name__}): save it as UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{CONFIG}{where}: not valid YAML: write one 'key: value' per line") from error
    if not isinstance(given, dict):
        raise UserError(f"{CONFIG}: holds no keys: write one 'key: value' per line, at least task and labels")
    return given


# ------------------------------------------------------------------------------------------------------- manifest.csv


def read_manifest(folder: Path | str, config: SiteConfig) -> list[Row]:
    """Read `<folder>/manifest.csv`. Raises `ProblemList` with every bad row."""
    rows, problems = parse_manifest(folder, config)
    if problems:
        raise ProblemList(problems)
    return rows


def parse_manifest(folder: Path | str, config: SiteConfig) -> tuple[list[Row], list[str]]:
    """The good rows of the manifest and one line for each problem; labels are not judged where the configured ones are
    empty (see `parse_site_config`)."""
    try:
        table = read_csv(Path(folder) / MANIFEST, MANIFEST)
    except UserError as error:
        return [], [str(error)]
    problems = _column_problems(table.header, config)
    if problems:
        return [], problems
    if not table.rows:
        return [], [f"{MANIFEST}: no row below the header: write one row per image"]

    rows = []
    cells = list(table.records())
    for column in (config.patient_column, config.split_column):
        filled = [bool(row.get(column)) for _, row in cells]
        if any(filled) and not all(filled):
            problems += [
                f"{MANIFEST} row {line}: column '{column}' is empty here but not in other rows: fill all rows or none"
                for (line, _), given in zip(cells, filled, strict=True)
                if not given
            ]
    for (line, row), (_, values) in zip(cells, table.rows, strict=True):
        image, wrong = image_name(row.get(config.image_column, ""))
        label = row.get(config.label_column, "")
        split = row.get(config.split_column) or None
        ragged = table.ragged(values)
        if ragged:
            wrong = wrong or ragged
        elif any(config.labels) and label not in config.labels:
            known = " nor ".join(f"'{name}'" for name in config.labels)
            wrong = wrong or f"label '{label}' is neither {known}: correct the row or labels in {CONFIG}"
        elif split is not None and split not in SPLITS:
            wrong = wrong or f"unknown split '{split}': {nearest(split, SPLITS)}"
        if wrong:
            problems.append(f"{MANIFEST} row {line}: {wrong}")
        else:
            positive = label == config.labels[1]
            rows.append(Row(line, image, int(positive), row.get(config.patient_column) or None, split))
    return rows, problems


def _column_problems(header: list[str], config: SiteConfig) -> list[str]:
    """Columns that are missing: required ones, ones that site.yaml names, and ones that stand under another name."""
    problems = []
    columns = {name: getattr(config, name) for name in vars(config) if name.endswith("_column")}
    for key, column in columns.items():
        if column in header:
            continue
        known = f"the column '{column}' is missing ({nearest(column, filter(None, header))})"
        if key not in LOOKS_LIKE:
            mend = "correct" if key in config.own else "set"
            problems.append(f"{MANIFEST}: {known}: add it, or {mend} {key} in {CONFIG}")
        elif key in config.own:
            problems.append(f"{MANIFEST}: {known}: add it, or correct or remove {key} in {CONFIG}")
        else:
            problems += [
                f"{MANIFEST}: is the column '{name}' the {column}? set {key}: {name} in {CONFIG}, or rename the column"
                for name in header
                if name not in columns.values() and re.sub("[ -]", "_", name.casefold()) in LOOKS_LIKE[key]
            ]
    return problems


def image_name(text: str) -> tuple[str, str | None]:
    """The relative path with forward slashes, and what is wrong with it."""
    name = text.replace("\\", "/")
    if not name:
        return name, "no image name: fill it in or delete the row"
    if name.startswith("/") or re.match(r"[A-Za-z]:", name):
        return name, "the image is given by an absolute path: give the path relative to the site folder"
    if ".." in PurePosixPath(name).parts or "\0" in name:
        return name, f"'{name}' leads out of the site folder: copy the image into it"
    return str(PurePosixPath(name)), None


# ------------------------------------------------------------------------------------------------------ where it lies


def find_site_folder(site: str, configured: str | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """The data folder of a site; never named by a job. Raises `UserError` when there is none.

    `configured` (from the site's own FLARE local config) if given, else HETEROSYNC_DATA/<site>, else HETEROSYNC_DATA
    itself when it is a site folder.
    """
    if not site or Path(site).name != site:
        raise UserError(f"'{site}' is not a site name: use letters, digits and hyphens")
    if configured:
        folder = Path(configured).expanduser()
        if not folder.is_dir():
            raise UserError(f"site {site}: the configured data folder does not exist: create it or correct the setting")
        return folder.resolve()
    if not environ.get("HETEROSYNC_DATA"):
        raise UserError(f"site {site}: no data folder is known: set HETEROSYNC_DATA, or configure it at the site")
    base = Path(environ["HETEROSYNC_DATA"]).expanduser().resolve()
    if (base / site).is_dir():
        return base / site
    if (base / CONFIG).is_file():
        return base
    others = sorted(path.parent.name for path in base.glob(f"*/{CONFIG}"))
    hint = nearest(site, others) if others else f"write {CONFIG} and {MANIFEST} there"
    raise UserError(f"site {site}: HETEROSYNC_DATA has no folder '{site}' and is no site folder itself: {hint}")
