"""Which image trains, which validates, which tests: stratified by label, patients kept together, drawn once.

Paper: 60/10/30 per site, stratified by label, image by image; keeping a patient's images together is an addition of
this project, used where the manifest has a patient column.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from heterosync.data.site import SPLITS, Row
from heterosync.data.tables import read_csv
from heterosync.errors import ProblemList, UserError, nearest
from heterosync.files import write_text

FILE = "splits.csv"
FRACTIONS = (0.6, 0.1, 0.3)


def split_rows(
    labels: Sequence[int] | np.ndarray,
    patients: Sequence[str | None] | None,
    seed: int,
    fractions: tuple[float, float, float] = FRACTIONS,
    sizes: Sequence[Sequence[int]] | None = None,
) -> dict[str, np.ndarray]:
    """Row numbers of train, validation and test, ascending.

    Per class the sizes are the fractions by largest remainder (ties go to validation, which meets the test sizes
    that the paper reports), with at least one image in validation and test when the class has three. Rows of one
    patient share a split; sizes are then met as closely as whole patients allow.
    sizes: [train, validation, test] of the negative and of the positive class, in place of the fractions.
    """
    patients = [None] * len(labels) if patients is None else patients
    groups = [f"patient {patient}" if patient else f"row {row}" for row, patient in enumerate(patients)]
    chosen = _assign(list(map(int, labels)), groups, seed, fractions, {}, sizes)
    return {split: np.flatnonzero([name == split for name in chosen]).astype(np.int64) for split in SPLITS}


def split_sizes(n: int, fractions: Sequence[float] = FRACTIONS) -> list[int]:
    """How many of `n` images of one class go to train, validation, test: largest remainder."""
    exact = [round(n * fraction / sum(fractions), 9) for fraction in fractions]  # 0.3 * 2010 is 603, not 602.99...
    sizes = [int(value) for value in exact]
    by_remainder = sorted((1, 2, 0), key=lambda split: -(exact[split] - sizes[split]))
    for split in by_remainder[: n - sum(sizes)]:
        sizes[split] += 1
    for split in (1, 2):
        if n >= 3 and fractions[split] > 0 and sizes[split] == 0:
            sizes[sizes.index(max(sizes))] -= 1
            sizes[split] = 1
    return sizes


def assign_splits(rows: Sequence[Row], content: Sequence[str], stored: Mapping[str, str], seed: int) -> list[str]:
    """The split of each row: its `split` column if the manifest has one, else the stored one, else a newly drawn one.

    `content` are the hashes of the pictures: copies of one picture share a split, as do the images of one patient. The
    draw depends on the image names, not on the order of the rows; rows with a stored split never move.
    """
    if all(row.split for row in rows):
        return [str(row.split) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: rows[row].image)
    groups = joined([(rows[row].patient, content[row]) for row in order])
    fixed = {i: stored[rows[row].image] for i, row in enumerate(order) if rows[row].image in stored}
    chosen = _assign([rows[row].label for row in order], groups, seed, FRACTIONS, fixed)
    result = [""] * len(rows)
    for row, split in zip(order, chosen, strict=True):
        result[row] = split
    return result


def read_splits(folder: Path) -> dict[str, str]:
    """image -> split of `<folder>/splits.csv`; empty when there is none. Raises `ProblemList` when it is damaged."""
    if not (folder / FILE).exists():
        return {}
    try:
        table = read_csv(folder / FILE, FILE)
    except UserError as error:
        raise ProblemList([f"{error}; or delete it to draw new splits"]) from error
    if table.header != ["image", "split"]:
        raise ProblemList([f"{FILE}: not the columns image,split: restore it, or delete it to draw new splits"])
    problems = []
    for line, row in table.rows:
        if len(row) != 2 or row[1] not in SPLITS:
            hint = nearest(row[1], SPLITS) if len(row) == 2 else "expected image,split"
            problems.append(f"{FILE} row {line}: unknown split: {hint}")
    if problems:
        raise ProblemList(problems)
    return {image: split for _, (image, split) in table.rows}


def write_splits(folder: Path, rows: Sequence[Row], splits: Sequence[str], stored: Mapping[str, str]) -> None:
    """Put the splits of `rows` into `<folder>/splits.csv`; entries of images that left the manifest stay there."""
    merged = dict(stored) | {row.image: split for row, split in zip(rows, splits, strict=True)}
    if merged == dict(stored):
        return
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("image", "split"), *sorted(merged.items())])
    write_text(folder / FILE, text.getvalue())


def joined(keys: Sequence[tuple[str | None, str]]) -> list[str]:
    """One group name per row: rows with the same patient or the same content share it (connected components)."""
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[tuple[str, str], int] = {}
    for row, (patient, content) in enumerate(keys):
        for key in [("content", content)] + ([("patient", patient)] if patient else []):
            parent[root(row)] = root(first.setdefault(key, row))
    return [str(root(row)) for row in range(len(keys))]


def _assign(
    labels: list[int],
    groups: list[str],
    seed: int,
    fractions: Sequence[float],
    fixed: Mapping[int, str],
    sizes: Sequence[Sequence[int]] | None = None,
) -> list[str]:
    """Greedy: the largest group first, each to the split that comes nearest to its target sizes. With groups of one
    row this meets the targets exactly; the seeded shuffle before makes the draw random."""
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    positives = {group: sum(labels[row] for row in rows) for group, rows in members.items()}
    counts = {group: (len(rows) - positives[group], positives[group]) for group, rows in members.items()}
    totals = [max(1, labels.count(label)) for label in (0, 1)]
    targets = sizes or [split_sizes(labels.count(label), fractions) for label in (0, 1)]
    filled = [[0, 0, 0], [0, 0, 0]]
    place: dict[str, int] = {}

    def put(group: str, split: int, sign: int = 1) -> None:
        place[group] = split
        for label in (0, 1):
            filled[label][split] += sign * counts[group][label]

    def error_change(group: str, split: int) -> float:
        change = 0.0
        for label in (0, 1):
            off, size = filled[label][split] - targets[label][split], counts[group][label]
            change += (2 * off * size + size * size) / totals[label] ** 2
        return change

    for row, name in sorted(fixed.items()):
        if groups[row] not in place:  # a group whose stored rows disagree is reported by the check
            put(groups[row], SPLITS.index(name))
    free = [group for group in members if group not in place]
    random.Random(f"splits {seed} {len(fixed)}").shuffle(free)
    usable = [split for split in range(3) if fractions[split] > 0]
    for group in sorted(free, key=lambda group: -len(members[group])):
        put(group, min(usable, key=lambda split: error_change(group, split)))
    for label in (0, 1):  # whole patients may have left validation or test without a class
        for split in (1, 2):
            if filled[label][split] or not targets[label][split]:
                continue
            donors = [g for g in free if counts[g][label] and filled[label][place[g]] > counts[g][label]]
            if donors:
                group = min(donors, key=lambda g: (place[g] != 0, len(members[g])))
                put(group, place[group], -1)
                put(group, split)
    chosen = [SPLITS[place[group]] for group in groups]
    for row, name in fixed.items():
        chosen[row] = name
    return chosen
