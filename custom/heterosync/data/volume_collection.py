"""Cases that an importer found, and the site folders that are written of them."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from heterosync import pulse
from heterosync.data.site import MANIFEST
from heterosync.data.site_yaml import CONFIG, VOLUMES
from heterosync.data.volume_facts import judge_size
from heterosync.data.volumes import Volume, write_nifti
from heterosync.errors import ProblemList, UserError
from heterosync.files import write_text

#: The columns of a manifest that an importer writes; `source` says where a case came from.
HEADER = ("image", "mask", "patient", "source")


@dataclass(frozen=True)
class FoundCase:
    """A case of a source: `id` names it there, `patient` is the same for all cases of one person."""

    id: str
    patient: str
    image: Volume
    mask: Volume


@dataclass(frozen=True)
class CaseCollection:
    """`foreground`: the mask values that together are the organ. `notes` tell what was left out."""

    name: str
    cases: list[FoundCase]
    foreground: tuple[int, ...] = (1,)
    notes: tuple[str, ...] = ()


def deal(collection: CaseCollection, sites: Sequence[str], seed: int) -> dict[str, CaseCollection]:
    """Give the cases to sites, as many to each as whole patients allow, at random by `seed`. Raises `UserError`."""
    patients: dict[str, list[FoundCase]] = {}
    for case in collection.cases:
        patients.setdefault(case.patient, []).append(case)
    if len(set(sites)) < len(sites) or any(Path(site).name != site for site in sites):
        raise UserError(f"{', '.join(sites)}: give each site a name of its own, without a path")
    if len(patients) < len(sites):
        raise UserError(f"{len(patients)} patients cannot be dealt among {len(sites)} sites: name fewer sites")
    order = sorted(patients)
    random.Random(f"deal {seed}").shuffle(order)
    parts: dict[str, list[FoundCase]] = {site: [] for site in sites}
    for patient in sorted(order, key=lambda patient: -len(patients[patient])):
        least = min(sites, key=lambda site: len(parts[site]))
        parts[least] += patients[patient]
    return {
        site: CaseCollection(
            f"{collection.name}, {site}", sorted(cases, key=lambda case: case.id), collection.foreground
        )
        for site, cases in parts.items()
    }


def write_volume_site(folder: Path, collection: CaseCollection, test_only: bool = False) -> None:
    """Fill an empty folder: images as they are in the source, masks as 0 and 1, all as compressed NIfTI, which has no
    patient's name.

    Raises `ProblemList` with every case whose mask is on another grid, is empty or has other values than 0 and the
    collection's foreground, and with every file that cannot be read.
    """
    problems: list[str] = []
    rows = []
    for number, case in enumerate(collection.cases, 1):
        pulse.beat()
        try:
            values, mask = _read(case, collection.foreground)
        except UserError as error:
            problems.append(str(error))
            continue
        names = [f"{part}/{number:04}.nii.gz" for part in ("images", "masks")]
        write_nifti(folder / names[0], values, case.image.geometry.affine)
        write_nifti(folder / names[1], mask, case.mask.geometry.affine)
        rows.append((*names, case.patient, case.id))
    if problems:
        raise ProblemList(problems)
    write_manifest(folder, rows, test_only)


def write_manifest(folder: Path, rows: Sequence[Sequence[str]], test_only: bool) -> None:
    """`manifest.csv` of rows (image, mask, patient, source) and `site.yaml`; `test_only` holds every case out."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow((*HEADER, *(["split"] if test_only else [])))
    writer.writerows((*row, *(["test"] if test_only else [])) for row in rows)
    write_text(folder / MANIFEST, text.getvalue())
    write_text(folder / CONFIG, f"task: {VOLUMES}\n")


def _read(case: FoundCase, foreground: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """The image, and the mask as bool in its own array order."""
    for volume in (case.image, case.mask):
        judge_size(volume)
    mismatch = case.image.geometry.mismatch(case.mask.geometry)
    if mismatch:
        raise UserError(f"{case.mask.name}: the mask {mismatch}, {case.image.name}: use the mask of this series")
    drawn = case.mask.read()
    other = np.setdiff1d(drawn, [0, *foreground])
    if len(other):
        known = ", ".join(map(str, foreground))
        raise UserError(
            f"{case.mask.name}: the mask has the value {other[0]:g} besides 0 and {known}: set --foreground"
        )
    mask = np.isin(drawn, foreground)
    if not mask.any():
        raise UserError(f"{case.mask.name}: the mask is empty: take the case out of the set")
    return case.image.read(), mask
