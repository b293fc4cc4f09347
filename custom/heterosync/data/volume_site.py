"""The site folder of a segmentation task: what `site.yaml` and `manifest.csv` say about volumes and their masks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterosync.data.site import MANIFEST, image_name, manifest_table
from heterosync.data.site_yaml import CONFIG, VOLUMES, Convert, SiteKeys, parse_keys, whole
from heterosync.data.tables import Table
from heterosync.errors import nearest

SPLITS = ("train", "test")  # a fold of the training cases is the validation set


@dataclass(frozen=True)
class VolumeConfig(SiteKeys):
    """The keys of `site.yaml` where `task` is segmentation; all others have these defaults."""

    task: str
    image_column: str = "image"
    mask_column: str = "mask"
    patient_column: str = "patient"  # may be absent from the manifest; then every case is its own patient
    split_column: str = "split"  # may be absent; then a fifth of the cases is held out, drawn once
    fold_column: str = "fold"  # may be absent; then the training cases are dealt into folds, drawn once
    foreground: tuple[int, ...] = (1,)  # the values of a mask that together are the organ
    folds: int = 5  # of the cross-validation


@dataclass(frozen=True)
class CaseRow:
    """One row of the manifest; `line` counts the header as 1. `fold` counts from 1, None in a test case."""

    line: int
    image: str
    mask: str
    patient: str | None = None
    split: str | None = None
    fold: int | None = None


def _foreground(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(item, str) and item.isdecimal() and int(item) > 0 for item in values):
        raise ValueError("expected the mask's values above 0 that are the organ, as [1] or [1, 2]")
    return tuple(sorted({int(item) for item in values}))


_CONVERT: dict[str, Convert] = {
    "foreground": _foreground,
    "folds": whole(2),  # one trains, one validates
    "batch_size": whole(1),
}


def parse_volume_config(folder: Path | str) -> tuple[VolumeConfig, list[str]]:
    """What could be read of `<folder>/site.yaml`, and one line for each problem; what is wrong has its default."""
    values, problems = parse_keys(folder, VolumeConfig, _CONVERT)
    return VolumeConfig(**{"task": VOLUMES, **values}, own=frozenset(values)), problems


def parse_volume_manifest(folder: Path | str, config: VolumeConfig) -> tuple[list[CaseRow], list[str]]:
    """The good rows of `<folder>/manifest.csv` and one line for each problem.

    With a fold column and no split column, cases without a fold are the held-out test cases.
    """
    table, problems = manifest_table(folder, config, "case")
    if table is None:
        return [], problems
    cells = list(table.records())
    rows = []
    folded = any(row.get(config.fold_column) for _, row in cells)
    seen: dict[str, int] = {}
    for (line, cell), (_, values) in zip(cells, table.rows, strict=True):
        row, wrong = _row(line, cell, values, table, config, folded)
        for name in (row.image, row.mask) if not wrong else ():
            if name in seen:
                wrong = f"{name} stands in row {seen[name]} already: correct or delete one of the rows"
            seen.setdefault(name, line)
        if wrong:
            problems.append(f"{MANIFEST} row {line}: {wrong}")
        else:
            rows.append(row)
    return rows, problems


def _row(
    line: int, cell: dict[str, str], values: list[str], table: Table, config: VolumeConfig, folded: bool
) -> tuple[CaseRow, str | None]:
    """A row, and what is wrong with it."""
    image, wrong = image_name(cell.get(config.image_column, ""))
    mask, mask_wrong = image_name(cell.get(config.mask_column, ""))
    split = cell.get(config.split_column) or None
    number = cell.get(config.fold_column) or None
    if folded and split is None:
        split = "train" if number else "test"
    row = CaseRow(line, image, mask, cell.get(config.patient_column) or None, split)
    wrong = table.ragged(values) or wrong or (mask_wrong and mask_wrong.replace("image", "mask"))
    if wrong:
        return row, wrong
    if split is not None and split not in SPLITS:
        hint = "give validation cases a fold, as other training cases; " if split == "validation" else ""
        return row, f"unknown split '{split}': {hint}{nearest(split, SPLITS)}"
    if number is None:
        if folded and split == "train":
            return row, f"a training case without a fold: give it one of 1 to {config.folds}"
        return row, None
    if split == "test":
        return row, f"a test case with fold {number}: leave its fold empty, or make it a training case"
    if not number.isdecimal() or not 1 <= int(number) <= config.folds:
        return row, f"fold '{number}': write a number of 1 to {config.folds}, or set folds in {CONFIG}"
    return CaseRow(line, image, mask, row.patient, split, int(number)), None
