"""Arguments that name a source of labelled images, shared by the `data` commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from heterosync.errors import UserError

if TYPE_CHECKING:
    from heterosync.data.collection import Collection

#: For help texts alone: what is known is decided by `heterosync.data.sources.SOURCES`, and a test compares the two.
SOURCE_KINDS = "folder, csv, npz, medmnist, mura, rsna, cifar10, bus-bra"
_COLUMNS = ("image", "label", "patient", "domain")


def add_source(parser: argparse.ArgumentParser) -> None:
    """SOURCE, the labels of the two classes and the columns."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=Path,
        help="folder (CLASS/… or DOMAIN/CLASS/…), .csv or .npz file, or a public set's own folder",
    )
    for name in ("negative", "positive"):
        parser.add_argument(
            f"--{name}", metavar="LABEL", help=f"label of the {name} class (public sets: as in the paper)"
        )
    for name in _COLUMNS:
        parser.add_argument(
            f"--{name}-column", metavar="NAME", help=f"column (default: {name}) or npz key (default: {name}s)"
        )


def add_kind(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kind", metavar="KIND", help=f"how the images are kept: {SOURCE_KINDS} (default: by the path)"
    )


def open_source(arguments: argparse.Namespace) -> Collection:
    """The collection that the arguments name, after printing its counts and notes."""
    from heterosync.data.sources import open_collection

    collection = open_collection(
        arguments.source, arguments.negative, arguments.positive, arguments.kind, **given_columns(arguments)
    )
    print(collection.summary())
    for note in collection.notes:
        print(f"note: {note}")
    return collection


def given_columns(arguments: argparse.Namespace) -> dict[str, str | None]:
    return {f"{name}_column": getattr(arguments, f"{name}_column") for name in _COLUMNS}


def seed(text: str) -> int:
    """An argparse type: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 0 or more")
    return int(text)


def named_paths(pairs: list[str] | None) -> dict[str, Path]:
    """`["rsna=/data/rsna"]` to a mapping. Raises `UserError` for a pair without `=` or a name given twice."""
    found: dict[str, Path] = {}
    for pair in pairs or ():
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise UserError(f"--sat-source {pair}: write NAME=PATH")
        if name in found:
            raise UserError(f"--sat-source {name} is given twice: leave one out")
        found[name] = Path(path)
    return found
