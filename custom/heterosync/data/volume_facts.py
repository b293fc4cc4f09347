"""What is known of a case once its image and mask were read: kept, so that unchanged files are not read again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heterosync import pulse
from heterosync.data.volumes import Volume, open_volume
from heterosync.errors import UserError
from heterosync.files import write_json

INDEX = "volumes.json"
VERSION = 1  # raise it when reading changes
WORKING_SPACING = 1.0  # mm; sizes are judged at the paper's spacing
LARGEST = 2**26  # voxels: 0.25 GiB as float32, some 3 GiB while being resampled; a prostate scan has 4 million
SPACING = (0.05, 20.0)  # mm; beyond these a header is wrong


@dataclass(frozen=True)
class CaseFacts:
    """`content` and `mask_content` are SHA-256 of shape and values, `grids` of both affines; `organ_ml` is the size of
    the organ."""

    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    orientation: str
    plane: str | None
    content: str
    mask_content: str
    grids: str
    organ_ml: float


def read_case(folder: Path, image: str, mask: str, foreground: Sequence[int]) -> tuple[CaseFacts | None, list[str]]:
    """Read a case and judge it: its facts, and one line for each problem. Values are read only of files whose headers
    are in order, so that nothing larger than `LARGEST` voxels is ever allocated."""
    opened: list[Volume] = []
    problems = []
    for name in (image, mask):
        try:
            volume = open_volume(folder / name, name)
            judge_size(volume)
            opened.append(volume)
        except UserError as error:
            problems.append(str(error))
    if problems:
        return None, problems
    scan, drawn = opened
    mismatch = scan.geometry.mismatch(drawn.geometry)
    if mismatch:
        problems.append(f"{mask}: the mask {mismatch}: draw or export it on the grid of {image}")
    content, values = _values(scan, problems)
    if values is not None:
        try:
            judge_values(image, values)
        except UserError as error:
            problems.append(str(error))
    mask_content, values = _values(drawn, problems)
    organ = 0
    if values is not None:
        organ = int(np.isin(values, foreground).sum())
        problems += _mask_problems(mask, values, foreground, organ)
    if problems:
        return None, problems
    geometry = scan.geometry
    facts = CaseFacts(
        shape=geometry.shape,
        spacing=tuple(round(float(step), 4) for step in geometry.spacing),
        orientation=geometry.orientation,
        plane=geometry.plane,
        content=content,
        mask_content=mask_content,
        grids=hashlib.sha256(np.stack([geometry.affine, drawn.geometry.affine]).tobytes()).hexdigest(),
        organ_ml=round(organ * geometry.millilitres, 3),
    )
    return facts, []


def judge_size(volume: Volume, spacing: float = WORKING_SPACING) -> None:
    """Raise `UserError` for a spacing that cannot be true, and for a volume too large as scanned or at `spacing` mm."""
    geometry, steps = volume.geometry, volume.geometry.spacing
    told = " x ".join(f"{step:.3g}" for step in steps)
    if steps.min() < SPACING[0] or steps.max() > SPACING[1]:
        raise UserError(f"{volume.name}: a spacing of {told} mm is not that of a scan: correct its header")
    for shape, at in ((geometry.shape, "as scanned"), (geometry.resampled_shape(spacing), f"at {spacing:g} mm")):
        voxels = int(np.prod(np.array(shape, dtype=object)))
        if voxels > LARGEST:
            size = f"{' x '.join(map(str, shape))} voxels {at}, {voxels * 4 / 2**30:.3g} GiB"
            most = f"(at most {LARGEST * 4 / 2**30:.3g})"
            raise UserError(f"{volume.name}: {size} {most}: crop it, or correct its spacing of {told} mm")


def judge_values(name: str, values: np.ndarray) -> None:
    """Raise `UserError` for an image without contrast, which has no unit variance."""
    if values.min() == values.max():
        raise UserError(f"{name}: every voxel is {values.flat[0]:g}, the image is constant: export it again")


def _values(volume: Volume, problems: list[str]) -> tuple[str, np.ndarray | None]:
    pulse.beat()
    try:
        values = volume.read()
    except UserError as error:
        problems.append(str(error))
        return "", None
    digest = hashlib.sha256(json.dumps(values.shape).encode())  # the same whatever the number type of the file
    digest.update(np.ascontiguousarray(values, dtype=np.float32).data)
    return digest.hexdigest(), values


def _mask_problems(mask: str, values: np.ndarray, foreground: Sequence[int], organ: int) -> list[str]:
    other = np.setdiff1d(values, [0, *foreground])
    if len(other):
        some = ", ".join(f"{value:g}" for value in other[:4]) + (", …" if len(other) > 4 else "")
        known = ", ".join(map(str, foreground))
        return [f"{mask}: the mask has values {some} besides 0 and {known}: correct it, or set foreground in site.yaml"]
    if not organ:
        return [f"{mask}: the mask is empty: draw the organ or delete the row"]
    if organ == values.size:
        return [f"{mask}: the mask marks every voxel: draw the organ alone or delete the row"]
    return []


class FactsIndex:
    """The facts of cases whose files have not changed since they were read, in `<root>/volumes.json`; root None keeps
    nothing. Only cases without a problem are kept."""

    def __init__(self, root: Path | None, foreground: Sequence[int]):
        self.path = root / INDEX if root else None
        self.foreground = foreground
        self.settings = [VERSION, list(foreground)]
        self.known: dict[str, Any] = {}
        if self.path is not None:
            with suppress(OSError, ValueError, KeyError, TypeError):  # absent or damaged: read the cases again
                index = json.loads(self.path.read_text(encoding="utf-8"))
                self.known = dict(index["cases"]) if index["settings"] == self.settings else {}
        self.kept: dict[str, Any] = {}

    def case(self, folder: Path, image: str, mask: str) -> tuple[CaseFacts | None, list[str]]:
        """`read_case`, or what it said of the same files earlier."""
        key = f"{image}|{mask}"
        stamps = [_stamps(folder / name) for name in (image, mask)]
        known = self.known.get(key)
        if all(stamps) and known and known["stamps"] == stamps:
            self.kept[key] = known
            facts = known["facts"]
            return CaseFacts(**facts | {name: tuple(facts[name]) for name in ("shape", "spacing")}), []
        facts, problems = read_case(folder, image, mask, self.foreground)
        if facts is not None:
            self.kept[key] = {"stamps": stamps, "facts": asdict(facts)}
        return facts, problems

    def write(self) -> None:
        if self.path is not None and self.kept != self.known:
            write_json(self.path, {"settings": self.settings, "cases": self.kept})


def _stamps(path: Path) -> dict[str, list[int]]:
    """Size and times of a file or of every file of a folder; and of the values beside a header."""
    try:
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        if path.suffix.lower() == ".mhd":
            files += sorted(path.parent.glob(f"{path.stem}.*raw"))
        status = {str(file.relative_to(path.parent)): os.stat(file) for file in files}
        return {name: [s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in status.items()}
    except OSError:
        return {}
