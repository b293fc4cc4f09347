"""Every problem of a folder of volumes and masks at once, one line each: what is wrong where, and how to mend it.

The lines name files and rows of patients' images: they are for the site's own screen and log, never for the server.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heterosync.data.cache import cache_root
from heterosync.data.check import no_site_folder
from heterosync.data.site import MANIFEST
from heterosync.data.site_yaml import CONFIG, VOLUMES, read_task
from heterosync.data.volume_facts import CaseFacts, FactsIndex
from heterosync.data.volume_folds import FILE as FOLDS_FILE
from heterosync.data.volume_folds import Place, assign_folds, read_folds
from heterosync.data.volume_site import CaseRow, VolumeConfig, parse_volume_config, parse_volume_manifest
from heterosync.errors import ProblemList


@dataclass
class VolumeInspection:
    """What was read of a site folder, and its problems; the other fields are complete only when there are none."""

    problems: list[str] = field(default_factory=list)
    config: VolumeConfig | None = None
    rows: list[CaseRow] = field(default_factory=list)
    facts: list[CaseFacts] = field(default_factory=list)  # by row
    places: list[Place] = field(default_factory=list)  # by row: 0 test, else the fold
    stored: dict[str, Place] = field(default_factory=dict)


def inspect_volumes(folder: Path | str, cache: Path | None = None) -> VolumeInspection:
    """Read and check every image and mask of a site folder; writes only to the cache.

    Files that have not changed since they were last found in order are not read again.
    """
    folder = Path(folder)
    found = VolumeInspection()
    wrong = no_site_folder(folder) or _other_kind(folder)
    if wrong:
        found.problems.append(wrong)
        return found
    found.config, found.problems = parse_volume_config(folder)
    rows, problems = parse_volume_manifest(folder, found.config)
    root = cache_root(folder, cache)
    index = FactsIndex(root, found.config.foreground)
    by_row: list[tuple[int, str]] = []
    for row in rows:
        facts, wrongs = index.case(folder, row.image, row.mask)
        by_row += [(row.line, wrong) for wrong in wrongs]
        if facts is not None:
            found.rows.append(row)
            found.facts.append(facts)
    index.write()
    by_row += _planes(found)
    if not found.problems and not problems and not by_row:
        try:
            found.stored = stored_folds(folder, root, found.config.folds)
            content = [facts.content for facts in found.facts]
            found.places = assign_folds(found.rows, content, found.stored, found.config.folds, found.config.split_seed)
        except ProblemList as error:
            problems += error.problems
    by_row += _leaks(found)
    problems += [f"{MANIFEST} row {line}: {text}" for line, text in sorted(by_row)]
    if found.places and not problems:
        problems += _missing_folds(found, found.config.folds)
    found.problems += problems
    return found


def _other_kind(folder: Path) -> str | None:
    task = read_task(folder)
    if task in ("", VOLUMES):
        return None
    return (
        f"{CONFIG}: task: {task}: no folder of volumes and masks: write task: {VOLUMES}, or submit a classification job"
    )


def stored_folds(folder: Path, root: Path | None, folds: int) -> dict[str, Place]:
    """The folds drawn earlier: in the site folder, or in the cache of a site folder that is read-only."""
    return read_folds(folder, folds) or (read_folds(root, folds) if root is not None else {})


def _planes(found: VolumeInspection) -> list[tuple[int, str]]:
    """Cases whose slices run otherwise than those of most: the other series of an examination taken by mistake."""
    planes = Counter(facts.plane for facts in found.facts if facts.plane)
    if len(planes) < 2:
        return []
    usual = max(planes, key=lambda plane: (planes[plane], plane == "axial"))
    mend = f"take its {usual} series, or delete the row"
    return [
        (row.line, f"{row.image}: {facts.plane} slices, most other cases have {usual} ones: {mend}")
        for row, facts in zip(found.rows, found.facts, strict=True)
        if facts.plane not in (None, usual)
    ]


def _leaks(found: VolumeInspection) -> list[tuple[int, str]]:
    """One image, or one patient, in two places of the cross-validation, and one image with two masks."""
    rows = found.rows
    drawn = any(row.split != "test" and not row.fold for row in rows)
    wheres = _wheres(found)
    mend = f"correct the row, or delete {FOLDS_FILE} to draw the folds again" if drawn else "correct the row"
    problems = []
    seen: dict[tuple[str, str | None], int] = {}
    for i, (row, facts) in enumerate(zip(rows, found.facts, strict=True)):
        j = seen.setdefault(("image", facts.content), i)
        same = f"{row.image} is the same image as row {rows[j].line}"
        if facts.mask_content != found.facts[j].mask_content:
            problems.append((row.line, f"{same} with another mask: delete one of the rows"))
        elif wheres[j] != wheres[i]:
            problems.append((row.line, f"{same}, which is {wheres[j]}: delete one of the rows"))
        j = seen.setdefault(("patient", row.patient), i) if row.patient else i
        if wheres[j] != wheres[i]:
            other = f"but in row {rows[j].line} {wheres[j]}"
            problems.append((row.line, f"patient {row.patient} is {wheres[i]} {other}: {mend}"))
    return problems


def _wheres(found: VolumeInspection) -> Sequence[str]:
    """Where each case is, in words: as the manifest gives it, else as drawn."""
    named = []
    for i, row in enumerate(found.rows):
        place = row.fold if row.fold else 0 if row.split == "test" else found.places[i] if found.places else None
        named.append("in training" if place is None else f"in fold {place}" if place else "in the test set")
    return named


def _missing_folds(found: VolumeInspection, folds: int) -> list[str]:
    """A folder of test cases alone is an outside test set; one without a test case must say so in its split column."""
    if all(row.split == "test" for row in found.rows):
        return []
    held = Counter(found.places)
    problems = []
    if not held[0] and not found.rows[0].split:
        problems.append(f"{MANIFEST}: no case is left for the test: add cases, or give all of them the split train")
    mend = f"add cases of other patients, or set folds: {max(2, len(set(found.places) - {0}))} in site.yaml"
    if any(row.fold for row in found.rows):
        mend = "give it one in the fold column, or lower folds in site.yaml"
    return problems + [f"{MANIFEST}: fold {fold} has no case: {mend}" for fold in range(1, folds + 1) if not held[fold]]
