"""Which case tests and which fold a training case is in: drawn once per site, shared by all experiments.

Federated prostate segmentation (Sarma et al., JAMIA 2021): of 100 cases 80 train, in 5 sets of 16, and 20 are held out.
Other numbers keep these shares. Keeping a patient's cases together is an addition of this project.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from heterosync.data.splits import joined
from heterosync.data.tables import read_csv
from heterosync.data.volume_site import SPLITS, CaseRow
from heterosync.errors import ProblemList, UserError
from heterosync.files import write_text

FILE = "folds.csv"
TEST_SHARE = 0.2
Place = int  # 0: held out for the test; 1, 2, …: the fold of a training case


def sizes(cases: int, folds: int, test: bool = True) -> list[int]:
    """How many cases are held out, and how many are in each fold: the first folds have one more where it must be."""
    held = round(cases * TEST_SHARE) if test else 0
    rest = cases - held
    return [held, *(rest // folds + (fold < rest % folds) for fold in range(folds))]


def assign_folds(
    rows: Sequence[CaseRow], content: Sequence[str], stored: Mapping[str, Place], folds: int, seed: int
) -> list[Place]:
    """The place of each case: as the manifest says, else as stored, else newly drawn.

    Cases of one patient and cases of equal `content` share a place. The draw depends on the names of the images and
    the seed, not on the order of the rows; stored cases never move.
    """
    if all(row.split == "test" or row.fold for row in rows):
        return [row.fold or 0 for row in rows]
    order = sorted(range(len(rows)), key=lambda row: rows[row].image)
    groups = joined([(rows[row].patient, content[row]) for row in order])
    members: dict[str, list[int]] = {}
    for row, group in zip(order, groups, strict=True):
        members.setdefault(group, []).append(row)
    given = bool(rows[0].split)  # the manifest names the test cases: only folds are drawn
    place: dict[str, Place] = {}
    for group, cases in members.items():
        if given and rows[cases[0]].split == "test":
            place[group] = 0
        known = [stored[rows[row].image] for row in cases if rows[row].image in stored]
        if group not in place and known and not (given and known[0] == 0):
            place[group] = known[0]
    trained = sum(len(cases) for group, cases in members.items() if not (given and place.get(group) == 0))
    targets = sizes(trained, folds, test=not given)
    filled = [0] * (folds + 1)
    for group, number in place.items():
        if number or not given:
            filled[number] += len(members[group])
    free = [group for group in members if group not in place]
    random.Random(f"folds {seed} {len(place)}").shuffle(free)
    bins = range(1 if given else 0, folds + 1)
    for group in sorted(free, key=lambda group: -len(members[group])):
        size = len(members[group])
        # nearest to the wanted sizes; of equally good ones an empty one, so that no fold stays without a case
        place[group] = min(bins, key=lambda i: (2 * (filled[i] - targets[i]) * size + size**2, filled[i] > 0, i))
        filled[place[group]] += size
    result = [0] * len(rows)
    for group, cases in members.items():
        for row in cases:
            result[row] = place[group]
    return result


def read_folds(folder: Path, folds: int) -> dict[str, Place]:
    """image -> place of `<folder>/folds.csv`; empty when there is none. Raises `ProblemList` when it is damaged."""
    if not (folder / FILE).exists():
        return {}
    mend = "restore it, or delete it to draw new folds"
    try:
        table = read_csv(folder / FILE, FILE)
    except UserError as error:
        raise ProblemList([f"{error}; or delete it to draw new folds"]) from error
    if table.header != ["image", "split", "fold"]:
        raise ProblemList([f"{FILE}: not the columns image,split,fold: {mend}"])
    found: dict[str, Place] = {}
    problems = []
    for line, values in table.rows:
        image, split, fold = [*values, "", "", ""][:3]
        number = int(fold) if fold.isdecimal() else 0
        in_order = fold == "" if split == "test" else split in SPLITS and 1 <= number <= folds
        if len(values) != 3 or not in_order:
            problems.append(
                f"{FILE} row {line}: not a test case, nor a training case with a fold of 1 to {folds}: {mend}"
            )
        found[image] = number
    if problems:
        raise ProblemList(problems)
    return found


def write_folds(folder: Path, rows: Sequence[CaseRow], places: Sequence[Place], stored: Mapping[str, Place]) -> None:
    """Put the places of `rows` into `<folder>/folds.csv`; entries of cases that left the manifest stay there."""
    merged = dict(stored) | {row.image: place for row, place in zip(rows, places, strict=True)}
    if merged == dict(stored):
        return
    lines = [(image, "train" if place else "test", place or "") for image, place in sorted(merged.items())]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("image", "split", "fold"), *lines])
    write_text(folder / FILE, text.getvalue())
