"""What a hospital writes about its data: `site.yaml` and `manifest.csv`, read into objects."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from heterosync.data.site_yaml import CONFIG, Convert, SiteKeys, parse_keys, text, whole
from heterosync.data.tables import Table, read_csv
from heterosync.errors import ProblemList, UserError, nearest

MANIFEST = "manifest.csv"
SPLITS = ("train", "validation", "test")

# Headers that say what a column is although it has another name: ignoring such a column would put images of one patient
# into several splits, or draw new splits in place of those given.
LOOKS_LIKE = {
    "patient_column": ("patient", "patient_id", "patientid", "pid", "subject"),
    "split_column": ("split", "fold", "set"),
    "fold_column": ("fold", "fold_id", "cv_fold"),
}


@dataclass(frozen=True)
class SiteConfig(SiteKeys):
    """The keys of `site.yaml`; `task` and `labels` are required, all others have these defaults."""

    task: str  # what the images are for, in words; stays at the site
    labels: tuple[str, str]  # the negative and the positive label, as the manifest writes them
    image_column: str = "image"
    label_column: str = "label"
    patient_column: str = "patient"  # may be absent from the manifest; then every image is its own patient
    split_column: str = "split"  # may be absent from the manifest; then heterosync draws 60/10/30 once
    window: tuple[float, float] | None = None  # centre and width for images of more than 8 bits; None: the file's own


@dataclass(frozen=True)
class Row:
    """One row of the manifest; `line` counts the header as 1, as a spreadsheet shows it."""

    line: int
    image: str
    label: int
    patient: str | None
    split: str | None


# ---------------------------------------------------------------------------------------------------------- site.yaml


def _labels(value: Any) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError("expected two names, the negative one first, as [normal, abnormal]")
    negative, positive = map(text, value)
    if negative == positive:
        raise ValueError("the two labels must differ")
    return negative, positive


def _window(value: Any) -> tuple[float, float]:
    try:
        centre, width = (float(part) for part in value)
        if not (abs(centre) < 1e9 and 1 < width < 1e9):
            raise ValueError
    except (TypeError, ValueError):
        raise ValueError("expected centre and width with a width above 1, as [40, 400]") from None
    return centre, width


_CONVERT: dict[str, Convert] = {
    "labels": _labels,
    "window": _window,
    "batch_size": whole(2),  # BatchNorm needs two images in a batch
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
    values, problems = parse_keys(folder, SiteConfig, _CONVERT)
    return SiteConfig(**{"task": "", "labels": ("", ""), **values}, own=frozenset(values)), problems


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
    table, problems = manifest_table(folder, config, "image")
    if table is None:
        return [], problems
    rows = []
    cells = list(table.records())
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


def manifest_table(folder: Path | str, config: Any, item: str) -> tuple[Table | None, list[str]]:
    """The manifest's table, None where there is none to go by, and a line for each problem of its columns; `item`: what
    a row stands for."""
    try:
        table = read_csv(Path(folder) / MANIFEST, MANIFEST)
    except UserError as error:
        return None, [str(error)]
    if problems := column_problems(table.header, config):
        return None, problems
    if not table.rows:
        return None, [f"{MANIFEST}: no row below the header: write one row per {item}"]
    cells = list(table.records())
    return table, [line for c in (config.patient_column, config.split_column) for line in partly_filled(cells, c)]


def partly_filled(cells: Sequence[tuple[int, dict[str, str]]], column: str) -> list[str]:
    """The rows in which a column is empty that others fill."""
    empty = [line for line, row in cells if not row.get(column)]
    return [
        f"{MANIFEST} row {line}: column '{column}' is empty here but not in other rows: fill all rows or none"
        for line in empty
        if len(empty) < len(cells)
    ]


def column_problems(header: list[str], config: Any) -> list[str]:
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


def image_name(cell: str) -> tuple[str, str | None]:
    """The relative path with forward slashes, and what is wrong with it."""
    name = cell.replace("\\", "/")
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
        if not folder.is_absolute():  # the folder that a job runs in is FLARE's choice
            raise UserError(f"site {site}: data_root of local/privacy.json is a relative path: give an absolute path")
        if not folder.is_dir():
            raise UserError(f"site {site}: data_root of local/privacy.json does not exist: correct the path")
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
