"""Read labelled image collections as people keep them: a folder per class, a CSV table, an npz file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Collection as Names
from pathlib import Path
from typing import Any

import numpy as np

from heterosync.data.collection import Collection
from heterosync.data.grey import to_uint8
from heterosync.data.labelled import both_present, class_numbers, finished, from_pixels, left_out_notes
from heterosync.data.packs import split_entry
from heterosync.data.readers import PILLOW_SUFFIXES, ImageReader
from heterosync.data.tables import read_csv
from heterosync.errors import ProblemList, UserError, nearest

#: Files that count as images below a class folder; "" because PACS exports often have no suffix.
IMAGE_SUFFIXES = (*PILLOW_SUFFIXES, ".dcm", ".dicom", ".ima", ".nii", ".gz", ".npy", "")


def from_folder(folder: Path | str, negative: str, positive: str) -> Collection:
    """`<folder>/<class>/…` or `<folder>/<domain>/<class>/…`; images are sought below each class folder at any depth."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder")
    wanted = class_numbers(negative, positive)
    top = _folders(folder)
    one_level = any(path.name in wanted for path in top)
    found = top if one_level else [path for domain in top for path in _folders(domain)]
    for name in wanted:
        if name not in {path.name for path in found}:
            names = {path.name for path in found or top}
            tail = nearest(name, names) if names else "it has no sub-folders"
            raise UserError(f"{folder}: no sub-folder is named '{name}', as <class> or <domain>/<class>; {tail}")
    notes = [f"sub-folder '{name}' left out" for name in sorted({path.name for path in found} - set(wanted))]
    paths, labels, domains = [], [], []
    for class_folder in [path for path in found if path.name in wanted]:
        files = sorted(path for path in class_folder.rglob("*") if path.is_file() and not path.name.startswith("."))
        images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
        if not images:
            raise UserError(f"{class_folder} holds no image: fill it or remove it")
        if len(files) > len(images):
            notes.append(f"{len(files) - len(images)} files in '{class_folder.name}' left out: no image format")
        paths += images
        labels += [wanted[class_folder.name]] * len(images)
        domains += ["" if one_level else class_folder.parent.name] * len(images)
    ids = [path.relative_to(folder).as_posix() for path in paths]
    return finished(folder.name, negative, positive, labels, ids, domains, None, paths=paths, notes=tuple(notes))


def from_csv(
    file: Path | str,
    negative: str,
    positive: str,
    image_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
    domain_column: str | None = None,
) -> Collection:
    """A table with a header and one image per row; relative paths start at the table's folder.

    Columns default to `image`, `label`, and `patient`, `domain` where they exist. `pack.npz#3` is entry 3 of a pack.
    Rows with another label are left out and counted in the notes.
    """
    file = Path(file)
    table = read_csv(file)
    header, rows = table.header, list(table.records())
    image = _column(file, header, image_column, "image")
    label = _column(file, header, label_column, "label")
    patient = _optional(file, header, patient_column, "patient")
    domain = _optional(file, header, domain_column, "domain")
    wanted = class_numbers(negative, positive)
    ragged = [(line, table.ragged(values)) for line, values in table.rows]
    problems = [f"{file} line {line}: {wrong}" for line, wrong in ragged if wrong]
    if problems:
        raise ProblemList(problems)
    if not rows:
        raise UserError(f"{file}: no row below the header: write one row per image")
    both_present(file, wanted, [row[label] for _, row in rows])
    kept: list[dict[str, str]] = []
    seen: dict[str, int] = {}
    for line, row in rows:
        if row[label] not in wanted:
            continue
        name = row[image]
        on_disk = file.parent / split_entry(name)[0]
        if not name:
            problems.append(f"{file} line {line}: the column '{image}' is empty: name the image or remove the row")
        elif not on_disk.is_file():
            problems.append(f"{file} line {line}: {on_disk} does not exist: correct the path or remove the row")
        elif name in seen:
            problems.append(f"{file} line {line}: {name} stands in line {seen[name]} already: remove one of the rows")
        elif patient is not None and not row[patient]:
            problems.append(f"{file} line {line}: the column '{patient}' is empty: fill it in or remove the row")
        else:
            kept.append(row)
        seen.setdefault(name, line)
    if problems:
        raise ProblemList(problems)
    ids = [row[image] for row in kept]
    return finished(
        file.name,
        negative,
        positive,
        [wanted[row[label]] for row in kept],
        ids,
        ["" if domain is None else row[domain] for row in kept],
        None if patient is None else [row[patient] for row in kept],
        notes=left_out_notes([row[label] for _, row in rows], wanted),
        **_pixels_or_paths(file, ids),
    )


def from_npz(
    file: Path | str,
    negative: str,
    positive: str,
    image_column: str | None = None,
    label_column: str | None = None,
    patient_column: str | None = None,
    domain_column: str | None = None,
) -> Collection:
    """Arrays under the keys `images` uint8 (n, h, w[, 3]) and `labels` (n,); optional `names`, `classes`, `patients`,
    `domains`. Labels are names, or numbers that `classes` translates. The MedMNIST layout (`train_images`, …) is read
    as one collection.
    """
    file = Path(file)
    arrays = _read_npz(file)
    for kind in ("images", "labels"):  # MedMNIST keeps three parts; a scenario divides anew
        parts = [arrays[f"{part}_{kind}"] for part in ("train", "val", "test") if f"{part}_{kind}" in arrays]
        if kind not in arrays and parts:
            arrays[kind] = np.concatenate(parts)
    images = arrays[_column(file, arrays, image_column, "images")]
    labels = arrays[_column(file, arrays, label_column, "labels")]
    patient_key = _optional(file, arrays, patient_column, "patients")
    domain_key = _optional(file, arrays, domain_column, "domains")
    if labels.size != len(images):
        raise UserError(
            f"{file}: {len(images)} images but labels of shape {labels.shape}: one label per image is needed"
        )
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in ((), (3,)):
        images = _as_uint8(file, images)
    names = _label_names(file, labels.reshape(-1), arrays.get("classes"))

    def texts(key: str | None) -> list[str] | None:
        return None if key is None else _texts(file, key, arrays, len(images)).tolist()

    ids = texts("names" if "names" in arrays else None) or [f"{file.name}#{row}" for row in range(len(images))]
    return from_pixels(file, negative, positive, images, names, ids, texts(domain_key), texts(patient_key))


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _column(source: Path, known: Names[str], given: str | None, default: str) -> str:
    """The column (or npz key) to use: the given one, else the default one; raises `UserError` when it is absent."""
    name = given or default
    if name not in known:
        raise UserError(f"{source} has no column or key '{name}'; {nearest(name, known)}")
    return name


def _optional(source: Path, known: Names[str], given: str | None, default: str) -> str | None:
    """As `_column`, but None when nothing was given and the default is absent."""
    return _column(source, known, given, default) if given or default in known else None


def _read_npz(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in arrays.files}
    except Exception as error:  # zipfile, pickle and header errors: all mean no usable npz
        raise UserError(f"{file} is not a readable .npz file of plain arrays ({error})") from error


def _label_names(file: Path, labels: np.ndarray, classes: np.ndarray | None) -> list[str]:
    if labels.dtype.kind == "U":
        return labels.tolist()
    if labels.dtype.kind not in "iub":
        raise UserError(f"{file}: labels are of type {labels.dtype}: store whole numbers or names")
    numbers = [int(label) for label in labels]
    if classes is None:
        return [str(number) for number in numbers]
    return [str(classes[number]) if 0 <= number < len(classes) else str(number) for number in numbers]


def _texts(source: Path, key: str, arrays: dict[str, np.ndarray], count: int) -> np.ndarray:
    values = arrays[key].reshape(-1)
    if len(values) != count:
        raise UserError(f"{source}: '{key}' has {len(values)} entries for {count} images")
    return values.astype(str)


def _as_uint8(file: Path, images: np.ndarray) -> np.ndarray:
    """Scaled image by image, exactly as a site folder's reader would."""
    if images.ndim not in (3, 4):
        raise UserError(f"{file}: images have shape {images.shape}; needed: (n, h, w) or (n, h, w, 3)")
    return np.stack(_every(lambda row: to_uint8(images[row]), range(len(images)), f"{file} image {{}}: ".format))


def _every(read: Callable[[Any], np.ndarray], names: Iterable[Any], where: Callable[[Any], str]) -> list[np.ndarray]:
    """`read` of all names; raises `ProblemList` with every one that fails, each behind `where`."""
    images, problems = [], []
    for name in names:
        try:
            images.append(read(name))
        except UserError as error:
            problems.append(f"{where(name)}{error}")
    if problems:
        raise ProblemList(problems)
    return images


def _pixels_or_paths(file: Path, names: list[str]) -> dict[str, Any]:
    """Entries of npz packs are taken as an array, other images stay files."""
    packed = [split_entry(name)[1] is not None for name in names]
    if not any(packed):
        return {"paths": [file.parent / name for name in names]}
    if not all(packed):
        raise UserError(f"{file}: some images are entries of an .npz pack and some are files: use one kind")
    reader = ImageReader(file.parent)
    images = _every(reader.read, names, lambda name: "")  # the reader names the entry itself
    if len({image.shape for image in images}) > 1:
        raise UserError(f"{file}: the packs hold images of different sizes: make one collection per size")
    return {"pixels": np.stack(images)}
