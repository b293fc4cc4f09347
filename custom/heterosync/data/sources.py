"""All kinds of image sources in one table: how each is read, and which two labels are meant when none are named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from heterosync.data.collection import Collection
from heterosync.data.importers import from_csv, from_folder, from_npz
from heterosync.data.public_sets import from_bus_bra, from_cifar10, from_mura, from_rsna
from heterosync.errors import UserError, nearest


@dataclass(frozen=True)
class Source:
    """read: (path, negative label, positive label) to a collection; file: suffix where it is a file, "" for a folder;
    labels: the negative and the positive one that the HeteroSync paper uses, None where the user must name them."""

    read: Callable[..., Collection]
    file: str = ""
    labels: tuple[str, str] | None = None


SOURCES = {
    "folder": Source(from_folder),
    "csv": Source(from_csv, ".csv"),
    "npz": Source(from_npz, ".npz"),
    "medmnist": Source(from_npz, ".npz"),
    "mura": Source(from_mura, labels=("negative", "positive")),
    "rsna": Source(from_rsna, labels=("Normal", "Lung Opacity")),
    "cifar10": Source(from_cifar10, labels=("airplane", "automobile")),
    "bus-bra": Source(from_bus_bra, labels=("benign", "malignant")),
}


def open_collection(
    source: Path | str,
    negative: str | None = None,
    positive: str | None = None,
    kind: str | None = None,
    **columns: str | None,
) -> Collection:
    """Import `source`; without a `kind`, by what it is: a folder per class, a `.csv` table or an `.npz` file.

    columns: `image_column` and so on, for sources that are tables. Raises `UserError`.
    """
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source} does not exist: give a folder with one sub-folder per class, a .csv or an .npz file")
    kind = kind or _kind_of(source)
    if kind not in SOURCES:
        raise UserError(f"no kind of source is named '{kind}'; {nearest(kind, SOURCES)}")
    reader = SOURCES[kind]
    if source.is_dir() and reader.file:
        raise UserError(f"{source} is a folder, but {kind} is a {reader.file} file: give that file")
    if not source.is_dir() and source.suffix.lower() != reader.file:
        what = f"{reader.file} file" if reader.file else "folder"
        raise UserError(f"{source} is not a {what}, as {kind} is: correct the path or the kind")
    named = [f"--{name.replace('_', '-')}" for name, value in columns.items() if value is not None]
    if named and not reader.file:
        raise UserError(f"{source} is a folder, which has no columns: leave out {', '.join(named)}")
    defaults = reader.labels or (None, None)
    negative, positive = negative or defaults[0], positive or defaults[1]
    if negative is None or positive is None:
        raise UserError(f"{source}: name the labels of the two classes with --negative and --positive")
    return reader.read(source, negative, positive, **columns if reader.file else {})


def _kind_of(source: Path) -> str:
    if source.is_dir():
        return "folder"
    if source.suffix.lower() not in (".csv", ".npz"):
        raise UserError(f"{source} is neither a folder nor a .csv or .npz file")
    return source.suffix.lower().lstrip(".")
