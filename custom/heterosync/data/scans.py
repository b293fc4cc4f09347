"""Volumes to be segmented: one file, one DICOM series, a folder of them at any depth, or a site folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.misc import is_dicom

from heterosync.data.site import MANIFEST
from heterosync.data.site_yaml import CONFIG, VOLUMES, open_kind, read_task
from heterosync.data.volume_facts import judge_size, judge_values
from heterosync.data.volume_preprocess import meta_tensor, to_geometry
from heterosync.data.volume_site import parse_volume_config, parse_volume_manifest
from heterosync.data.volumes import METAIMAGE, NIFTI, Volume, open_volume
from heterosync.errors import ProblemList, UserError

SUFFIXES = (*NIFTI[::-1], *METAIMAGE)


@dataclass(frozen=True)
class Scan:
    """An opened volume. `id`: its path below the folder, without a suffix; `mask`: the organ as drawn, where it is
    known, with the values that it has there."""

    id: str
    image: Volume
    mask: Volume | None = None
    foreground: tuple[int, ...] = (1,)

    def organ(self) -> np.ndarray | None:
        """The drawn organ as bool (x, y, z) at the voxels of the image, whatever the array order of its file."""
        if self.mask is None:
            return None
        drawn = meta_tensor(np.isin(self.mask.read(), self.foreground), self.mask.geometry)
        return np.asarray(to_geometry(drawn.as_tensor(), drawn.affine, self.image.geometry, "nearest")[0] > 0)


def open_scans(path: Path | str) -> list[Scan]:
    """Open what is there, in the order of the names; a site folder's in that of its manifest, with their masks.

    Headers alone are read. Raises `UserError`, or `ProblemList` with everything that is no volume.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist: name a volume, a DICOM series, a folder of them or a site folder")
    if (path / CONFIG).is_file() and (path / MANIFEST).is_file():
        return _of_site(path)
    if path.is_file() or _is_series(path):
        return [Scan(_stem(path.absolute().name), open_volume(path))]
    sites = sorted(file.parent for file in path.rglob(CONFIG))
    if sites:
        raise UserError(f"{path} holds site folders: name one of them, for example {sites[0]}")
    found = [(file.relative_to(path).as_posix(), file) for file in _volumes_below(path)]
    if not found:
        raise UserError(f"{path} holds no volume: NIfTI, MetaImage (.mhd, .mha) and DICOM series are read")
    stems = Counter(_stem(name) for name, _ in found)
    problems = [f"{stem}: {count} volumes have this name: rename them" for stem, count in stems.items() if count > 1]
    scans = []
    for name, file in found:
        try:
            scans.append(Scan(_stem(name), open_volume(file, name)))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ProblemList(problems)
    return scans


def check_scans(scans: list[Scan], spacing: float) -> None:
    """Judge the size of every scan, as it is and at `spacing` mm, then read it once, so that a set is refused before
    hours are spent on a part of it. Raises `ProblemList`."""
    problems = []
    for scan in scans:
        try:
            judge_size(scan.image, spacing)
            judge_values(scan.image.name, scan.image.read())
            if scan.mask is not None:
                scan.mask.read()
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ProblemList(problems)


def _of_site(folder: Path) -> list[Scan]:
    unknown = open_kind(folder)
    if unknown:
        raise UserError(unknown)
    if read_task(folder) not in ("", VOLUMES):
        raise UserError(f"{folder} is a site folder of pictures: name one whose {CONFIG} has the task {VOLUMES}")
    config, problems = parse_volume_config(folder)
    rows, wrong = parse_volume_manifest(folder, config)
    problems += wrong
    scans = []
    for row in rows:
        try:
            image, mask = (open_volume(folder / name, name) for name in (row.image, row.mask))
            mismatch = image.geometry.mismatch(mask.geometry)
            if mismatch:
                raise UserError(f"{row.mask}: the mask {mismatch}: draw or export it on the grid of {row.image}")
            scans.append(Scan(_stem(row.image), image, mask, config.foreground))
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise ProblemList(problems)
    return scans


def _volumes_below(folder: Path) -> Iterator[Path]:
    """Files of volumes, and folders with slices of DICOM."""
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if _is_series(path) or (path.is_file() and path.name.lower().endswith(SUFFIXES)):
            yield path


def _is_series(path: Path) -> bool:
    """A folder with a file of DICOM in it."""
    return path.is_dir() and any(
        file.is_file() and file.name != "DICOMDIR" and not file.name.lower().endswith(SUFFIXES) and is_dicom(file)
        for file in path.iterdir()
    )


def _stem(name: str) -> str:
    suffix = next((end for end in SUFFIXES if name.lower().endswith(end)), "")
    return name[: len(name) - len(suffix)]
