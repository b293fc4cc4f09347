"""From what an importer found to a collection: two labels, nothing twice, and a note for all that is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from heterosync.data.collection import Collection, without_duplicates
from heterosync.errors import ProblemList, UserError, nearest


class Entry(NamedTuple):
    """One image file of a source, with everything that the source tells about it."""

    path: Path
    label: str
    id: str
    domain: str = ""
    patient: str = ""


def from_entries(
    source: Path, negative: str, positive: str, entries: Sequence[Entry], notes: Sequence[str] = ()
) -> Collection:
    """The collection of the entries of two labels; the others are left out and counted in the notes.

    Patients are kept when every entry names one. Raises `UserError` when a label is absent, `ProblemList` with every
    file that does not exist.
    """
    wanted = class_numbers(negative, positive)
    found = [entry.label for entry in entries]
    both_present(source, wanted, found)
    kept = [entry for entry in entries if entry.label in wanted]
    absent = [str(entry.path) for entry in kept if not entry.path.is_file()]
    if absent:
        raise ProblemList([f"{source}: {path} does not exist: download the set again" for path in absent])
    patients = [entry.patient for entry in kept]
    return finished(
        source.name,
        negative,
        positive,
        [wanted[entry.label] for entry in kept],
        [entry.id for entry in kept],
        [entry.domain for entry in kept],
        patients if all(patients) else None,
        paths=[entry.path for entry in kept],
        notes=(*notes, *left_out_notes(found, wanted)),
    )


def from_pixels(
    source: Path,
    negative: str,
    positive: str,
    images: np.ndarray,
    found: Sequence[str],
    ids: Sequence[str],
    domains: Sequence[str] | None = None,
    patients: Sequence[str] | None = None,
) -> Collection:
    """As `from_entries`, of images in memory: uint8 (n, h, w) or (n, h, w, 3), with a label in `found` for each."""
    wanted = class_numbers(negative, positive)
    both_present(source, wanted, found)
    keep = [row for row, name in enumerate(found) if name in wanted]
    return finished(
        source.name,
        negative,
        positive,
        [wanted[found[row]] for row in keep],
        [ids[row] for row in keep],
        ["" if domains is None else domains[row] for row in keep],
        None if patients is None else [patients[row] for row in keep],
        pixels=images[keep],
        notes=left_out_notes(found, wanted),
    )


def finished(
    name: str,
    negative: str,
    positive: str,
    labels: Sequence[int],
    ids: list[str],
    domains: list[str],
    patients: list[str] | None,
    **content: Any,
) -> Collection:
    values = np.asarray(labels, dtype=np.int64)
    return without_duplicates(Collection(name, (negative, positive), values, ids, domains, patients, **content))


def class_numbers(negative: str, positive: str) -> dict[str, int]:
    if negative == positive:
        raise UserError(f"the negative and the positive class are both '{negative}': name two classes")
    return {negative: 0, positive: 1}


def both_present(source: Path, wanted: dict[str, int], found: Sequence[str]) -> None:
    for name in wanted:
        if name not in found:
            raise UserError(f"{source}: no image has the label '{name}'; {nearest(name, set(found))}")


def left_out_notes(found: Sequence[str], wanted: dict[str, int]) -> tuple[str, ...]:
    others = Counter(name for name in found if name not in wanted)
    return tuple(f"{count} images left out: label '{name}'" for name, count in sorted(others.items()))
