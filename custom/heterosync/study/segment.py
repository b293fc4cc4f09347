"""Masks of the organ in scans that the model has never seen, from model files alone, on the voxels of each scan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from heterosync.data.scans import Scan, check_scans, open_scans
from heterosync.data.volume_preprocess import Preprocessing, to_geometry
from heterosync.data.volumes import Volume, write_nifti
from heterosync.errors import UserError
from heterosync.federation.modelfile import ModelFile
from heterosync.files import new_folder, write_text
from heterosync.methods.base import Method
from heterosync.study.ensemble import build_alike
from heterosync.study.figures.overlay import overlays
from heterosync.study.predict import open_device
from heterosync.study.table import csv_table
from heterosync.training.dice import THRESHOLD, CaseScore, score_case, summarise
from heterosync.training.segmentation import probability_map
from heterosync.training.views import View, axial_view

SUFFIX = ".nii.gz"
MASKS, PROBABILITIES, TABLE, OVERLAYS = "masks", "probabilities", "cases.csv", "overlays"
COLUMNS = ("image", "mask", "volume", "dice", "hd95", "reference_volume")


@dataclass(frozen=True)
class Segmenter:
    """One model, or several whose probabilities are averaged (the ensemble of Sarma et al., JAMIA 2021)."""

    method: Method
    networks: Sequence[nn.Module]
    device: torch.device

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.method.training.spacing, self.method.training.interpolation)

    def probabilities(self, volume: Volume) -> np.ndarray:
        """Probability of the organ at each voxel of the scan, float32 of the scan's shape: resampled, segmented window
        by window in float32, and brought back by linear interpolation. Raises `UserError`."""
        image = self.preprocessing.image(volume.read(), volume.geometry)
        try:
            found = probability_map(self.method, self.networks, image.as_tensor(), self.device)
        except UserError as error:
            raise UserError(f"{volume.name}: {error}") from error
        return to_geometry(found[None], image.affine, volume.geometry)[0]


def open_segmenter(files: Sequence[ModelFile], device: str = "cpu") -> Segmenter:
    """Raises `UserError` as `build_alike`, and for a device that is not there."""
    place, built = open_device(device), build_alike(files)
    return Segmenter(built[0][0], [network.to(place) for _, network in built], place)


@dataclass(frozen=True)
class Segmented:
    """A scan with what was found in it: `volume` in ml; `score` and `view` where its mask is known."""

    scan: Scan
    volume: float
    score: CaseScore | None
    view: View | None

    def __str__(self) -> str:
        known = f", Dice {self.score.dice:.3f}" if self.score else ""
        return f"{self.scan.image.name}: {self.volume:.1f} ml{known}"

    @property
    def row(self) -> list[object]:
        known = [self.score.dice, self.score.hd95, self.score.reference_volume] if self.score else [None] * 3
        return [self.scan.image.name, f"{MASKS}/{self.scan.id}{SUFFIX}", self.volume, *known]


@dataclass(frozen=True)
class Segmentations:
    """What `predict_volumes` wrote, and `metrics` (see dice.summarise) where masks were known."""

    files: list[Path]
    cases: list[Segmented]
    metrics: dict[str, float | None] | None


def predict_volumes(
    files: Sequence[ModelFile],
    source: Path | str,
    out: Path | str,
    device: str = "cpu",
    probability: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Segmentations:
    """Write the mask of every scan as NIfTI on the scan's own voxels: 1 where the probability is 0.5 or more.

    `out` is a file (.nii.gz) for a single scan; `probability` puts FILE_probability.nii.gz beside it. Otherwise it is a
    new folder with masks/, probabilities/ and cases.csv: volumes in ml, and of a site folder, whose masks are known,
    Dice, 95 % Hausdorff distance in mm and drawn volume, all on the scan's voxels, with overlays of the best, the
    median and the worst case. All scans are checked before the first is segmented; nothing is there by halves.

    Raises `UserError`, and `ProblemList` with every scan that cannot be segmented.
    """
    out = Path(out)
    single = out.name.lower().endswith((SUFFIX, ".nii"))
    if single and not out.name.lower().endswith(SUFFIX):
        raise UserError(f"--out {out}: masks are compressed: name it {out.name}.gz")
    scans = open_scans(source)
    if single and len(scans) > 1:
        raise UserError(f"--out {out} is one file, and {source} holds {len(scans)} scans: name a folder")
    segmenter = open_segmenter(files, device)
    check_scans(scans, segmenter.preprocessing.spacing)
    if single:
        paths = [out, *([out.with_name(f"{out.name[: -len(SUFFIX)]}_probability{SUFFIX}")] if probability else [])]
        cases = [_segment(segmenter, scans[0], paths)]
        return Segmentations(paths, cases, _metrics(cases))
    cases, parts = [], [MASKS, *([PROBABILITIES] if probability else [])]
    with new_folder(out) as folder:
        for scan in scans:
            cases.append(_segment(segmenter, scan, [folder / part / f"{scan.id}{SUFFIX}" for part in parts]))
            say(str(cases[-1]))
        write_text(folder / TABLE, csv_table(COLUMNS, [case.row for case in cases]))
        views = [case.view for case in cases if case.view]
        drawn = overlays(views, folder / OVERLAYS) if views else []
    return Segmentations(
        [out / name for name in (*parts, TABLE, *(path.name for path in drawn))], cases, _metrics(cases)
    )


def _segment(segmenter: Segmenter, scan: Scan, paths: Sequence[Path]) -> Segmented:
    """Write the mask and, where there is a second path, the probabilities."""
    geometry, probabilities = scan.image.geometry, segmenter.probabilities(scan.image)
    found = probabilities >= THRESHOLD
    for path, values in zip(paths, (found, probabilities), strict=False):
        write_nifti(path, values, geometry.affine)
    spacing = geometry.spacing.tolist()
    volume = int(found.sum()) * geometry.millilitres
    organ = scan.organ()
    if organ is None:
        return Segmented(scan, volume, None, None)
    score = score_case(scan.id, torch.from_numpy(found), torch.from_numpy(organ), spacing, geometry.millilitres)
    image, drawn, mine = (geometry.in_canonical_order(values) for values in (scan.image.read(), organ, found))
    view = axial_view(scan.id, score.dice, image, drawn, mine, geometry.canonical().spacing.tolist())
    return Segmented(scan, volume, score, view)


def _metrics(cases: Sequence[Segmented]) -> dict[str, float | None] | None:
    scores = [case.score for case in cases if case.score]
    return summarise(scores) if scores else None
