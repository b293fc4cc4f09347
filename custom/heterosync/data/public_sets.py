"""Read public image sets in the layout in which their makers publish them. To add one: a function here (or a file of
its own) and a line in `sources.SOURCES`.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from heterosync.data.collection import Collection
from heterosync.data.labelled import Entry, from_entries, from_pixels
from heterosync.data.tables import Table, read_csv
from heterosync.errors import ProblemList, UserError, nearest

_STUDY = re.compile(r"study\d+_(positive|negative)")
RSNA_CLASSES, RSNA_IMAGES = "stage_2_detailed_class_info.csv", "stage_2_train_images"
CIFAR_FOLDER = "cifar-10-batches-py"
BUS_BRA_TABLE = "bus_data.csv"


def from_mura(folder: Path, negative: str, positive: str) -> Collection:
    """MURA (Rajpurkar et al., arXiv 1712.06957): `[train|valid/]XR_SHOULDER/patient00001/study1_positive/image1.png`.

    Labels `negative` (normal) and `positive` (abnormal) are those of the study. Domain: the body part in small letters;
    patient: the patient's folder, the same person in every body part. Both published parts become one collection.
    """
    tops = [folder] if folder.name.startswith("XR_") else sorted([*folder.glob("XR_*"), *folder.glob("*/XR_*")])
    tops = [top for top in tops if top.is_dir()]
    if not tops:
        raise UserError(f"{folder} holds no folder XR_…: give the folder MURA-v1.1, or its train or valid")
    entries, unlabelled = [], 0
    for top in tops:
        for path in sorted(top.glob("patient*/study*/*")):
            if path.name.startswith(".") or not path.is_file():
                continue
            study = _STUDY.fullmatch(path.parent.name)
            if study is None:
                unlabelled += 1
                continue
            name, domain = path.relative_to(folder).as_posix(), top.name.removeprefix("XR_").lower()
            entries.append(Entry(path, study[1], name, domain, path.parents[1].name))
    notes = [f"{unlabelled} images left out: their study's folder names no label"] if unlabelled else []
    if not entries:
        raise UserError(f"{folder}: no image lies in XR_…/patient…/study…_negative or _positive: unpack MURA again")
    return from_entries(folder, negative, positive, entries, notes)


def from_rsna(folder: Path, negative: str, positive: str) -> Collection:
    """RSNA Pneumonia Detection Challenge (2018): `stage_2_detailed_class_info.csv` (patientId, class; one row per box)
    and `stage_2_train_images/<patientId>.dcm`.

    Labels `Normal`, `Lung Opacity` and `No Lung Opacity / Not Normal`. Patient: the patientId, one image each.
    """
    file = folder / RSNA_CLASSES
    table = _table(file, ("patientId", "class"))
    classes: dict[str, str] = {}
    problems = []
    for line, row in table.records():
        patient, name = row["patientId"], row.get("class", "")
        if classes.setdefault(patient, name) != name:
            problems.append(f"{file} line {line}: {patient} is '{name}' here but '{classes[patient]}' above")
    if problems:
        raise ProblemList(problems)
    images = folder / RSNA_IMAGES
    entries = [Entry(images / f"{p}.dcm", name, f"{p}.dcm", patient=p) for p, name in classes.items()]
    return from_entries(folder, negative, positive, entries)


def from_bus_bra(folder: Path, negative: str, positive: str) -> Collection:
    """BUS-BRA (Gómez-Flores et al., Med. Phys. 2024): `bus_data.csv` (ID, Case, Pathology, Device, …) and
    `Images/<ID>.png`.

    Labels `benign` and `malignant`. Patient: the Case; domain: the Device (four scanners), where the table has it.
    """
    file = folder / BUS_BRA_TABLE
    table = _table(file, ("ID", "Case", "Pathology"))
    entries = []
    for line, row in table.records():
        if not row["ID"] or not row.get("Case"):
            raise UserError(f"{file} line {line}: the columns ID and Case must be filled: download the set again")
        path = folder / "Images" / f"{row['ID']}.png"
        domain, label = row.get("Device", ""), row.get("Pathology", "").lower()
        entries.append(Entry(path, label, f"Images/{path.name}", domain, row["Case"]))
    return from_entries(folder, negative, positive, entries)


def from_cifar10(folder: Path, negative: str, positive: str) -> Collection:
    """CIFAR-10 (Krizhevsky 2009) as torchvision keeps it: `cifar-10-batches-py/data_batch_1` … `test_batch`.

    Labels are the ten class names; training and test images become one collection of 60 000. torchvision compares the
    files' checksums before it opens them, since they are pickles.
    """
    from torchvision.datasets import CIFAR10

    root = folder.parent if folder.name == CIFAR_FOLDER else folder
    if not (root / CIFAR_FOLDER).is_dir():
        raise UserError(f"{folder} holds no folder {CIFAR_FOLDER}: unpack cifar-10-python.tar.gz there")
    try:
        parts = [CIFAR10(root, train=train, download=False) for train in (True, False)]
    except RuntimeError as error:
        raise UserError(
            f"{root / CIFAR_FOLDER} is incomplete or damaged: unpack cifar-10-python.tar.gz again"
        ) from error
    names = [part.classes[target] for part in parts for target in part.targets]
    ids = [f"{name}/{row}" for name, part in zip(("train", "test"), parts, strict=True) for row in range(len(part))]
    return from_pixels(folder, negative, positive, np.concatenate([part.data for part in parts]), names, ids)


def _table(file: Path, columns: tuple[str, ...]) -> Table:
    if not file.is_file():
        raise UserError(f"{file} is missing: give the folder that holds {file.name}")
    table = read_csv(file)
    for column in columns:
        if column not in table.header:
            raise UserError(f"{file} has no column '{column}'; {nearest(column, table.header)}")
    return table
