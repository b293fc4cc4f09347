"""A pool of labelled images that importers fill and scenarios divide among sites."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from heterosync.data.images import content_hash
from heterosync.data.readers import read_image
from heterosync.errors import ProblemList, UserError


@dataclass(frozen=True)
class Collection:
    """Labelled images of one task, held as an array (`pixels`) or as files that are read when needed (`paths`).

    name: where they come from, for messages.
    classes: names of the negative and the positive class.
    labels: int64 (n,), 0 negative / 1 positive.
    ids: name of each image in its source.
    domains: body region, scanner, hospital … of each image; "" where unknown.
    patients: patient of each image, or None where unknown for all.
    pixels: uint8 (n, h, w) or (n, h, w, 3).
    digests: content hash of each image, where they were computed.
    notes: what importing left out, one line each.
    """

    name: str
    classes: tuple[str, str]
    labels: np.ndarray
    ids: list[str]
    domains: list[str]
    patients: list[str] | None = None
    pixels: np.ndarray | None = None
    paths: list[Path] | None = None
    digests: list[str] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, row: int) -> np.ndarray:
        """uint8 (h, w) or (h, w, 3). Raises `UserError` when the file cannot be read."""
        if self.pixels is not None:
            return self.pixels[row]
        assert self.paths is not None
        path = self.paths[row]
        try:
            return read_image(path)
        except UserError as error:  # it names the file alone, and several folders may hold one of that name
            raise UserError(f"{self.ids[row]}{str(error).removeprefix(path.name)}") from error

    def subset(self, rows: Sequence[int] | np.ndarray) -> Collection:
        rows = np.asarray(rows, dtype=np.int64)

        def pick(values: list) -> list:
            return [values[row] for row in rows]

        return replace(
            self,
            labels=self.labels[rows],
            ids=pick(self.ids),
            domains=pick(self.domains),
            patients=None if self.patients is None else pick(self.patients),
            pixels=None if self.pixels is None else self.pixels[rows],
            paths=None if self.paths is None else pick(self.paths),
            digests=None if self.digests is None else pick(self.digests),
        )

    def counts(self) -> tuple[int, int]:
        """Number of negative and of positive images."""
        positive = int(self.labels.sum())
        return len(self) - positive, positive

    def summary(self) -> str:
        negative, positive = self.counts()
        return f"{self.name}: {len(self)} images, {negative} {self.classes[0]}, {positive} {self.classes[1]}"


def content_digests(collection: Collection) -> list[str]:
    """One digest per image. Raises `ProblemList` with every unreadable file."""

    def digest(row: int) -> str | UserError:
        try:
            return content_hash(collection.image(row))
        except UserError as error:
            return error

    if collection.pixels is not None:
        found = [digest(row) for row in range(len(collection))]
    else:
        with ThreadPoolExecutor() as pool:  # decoders work outside Python's lock
            found = list(pool.map(digest, range(len(collection)), chunksize=16))
    problems = [str(item) for item in found if isinstance(item, UserError)]
    if problems:
        raise ProblemList(problems)
    return [str(item) for item in found]


def without_duplicates(collection: Collection) -> Collection:
    """Keep the first of several images with equal pixels and label; leave out all whose labels contradict each other.

    The result's notes say how many were left out and name the contradictory ones.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    digests = content_digests(collection)
    for row, digest in enumerate(digests):
        groups[digest].append(row)
    kept, contradictory = [], []
    for rows in groups.values():
        if len({int(collection.labels[row]) for row in rows}) > 1:
            contradictory += rows
        else:
            kept.append(rows[0])
    notes = list(collection.notes)
    repeated = len(collection) - len(kept) - len(contradictory)
    if repeated:
        notes.append(f"{repeated} images left out: same content and label as another one")
    if contradictory:
        names = ", ".join(collection.ids[row] for row in sorted(contradictory)[:6])
        more = ", …" if len(contradictory) > 6 else ""
        notes.append(f"{len(contradictory)} images left out: same content but contradictory labels ({names}{more})")
    if not kept:
        raise UserError(f"{collection.name}: no image is left after removing duplicates: check the labels")
    return replace(collection, digests=digests, notes=tuple(notes)).subset(sorted(kept))
