"""A site's volumes, checked, resampled once and kept, ready for the training loop."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch

from heterosync import pulse
from heterosync.data.cache import cache_root
from heterosync.data.dataset import keep_drawn
from heterosync.data.volume_check import inspect_volumes
from heterosync.data.volume_facts import CaseFacts, judge_size
from heterosync.data.volume_folds import Place, write_folds
from heterosync.data.volume_geometry import Geometry
from heterosync.data.volume_preprocess import Preprocessing
from heterosync.data.volume_site import CaseRow, VolumeConfig
from heterosync.data.volumes import open_volume
from heterosync.errors import ProblemList, UserError
from heterosync.files import write_with

VERSION = 1  # raise it when preprocessing changes
FOLDER = "volumes"
KEPT = 3  # further preprocessings whose prepared cases stay
DAY = 86400  # seconds; a temporary file older than this is of a killed process


@dataclass(frozen=True)
class Case:
    """A prepared case: `image` float32 and `mask` uint8 (0, 1), both (1, x, y, z) on the grid with `affine` (4, 4)."""

    id: str
    image: torch.Tensor
    mask: torch.Tensor
    affine: torch.Tensor


@dataclass(frozen=True)
class VolumeSite:
    """The cases of a site. `places` by case: 0 held out for the test, else the number of its fold.

    `site[i]` is case i, mapped from the cache where there is one; ids are paths relative to the site folder and never
    leave the site.
    """

    folder: Path
    config: VolumeConfig
    rows: list[CaseRow]
    facts: list[CaseFacts]
    places: list[Place]
    preprocessing: Preprocessing
    root: Path | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def fold(self, number: int) -> dict[str, np.ndarray]:
        """Case numbers, ascending (int64): `validation` is fold `number` (from 1), `train` the other folds, `test` the
        held-out cases. Raises `UserError` when there is no such fold."""
        folds = self.config.folds
        if not 1 <= number <= folds:
            raise UserError(f"fold {number}: this site has folds 1 to {folds} (folds in site.yaml)")
        places = np.asarray(self.places)
        parts = {"train": (places != 0) & (places != number), "validation": places == number, "test": places == 0}
        return {name: np.flatnonzero(chosen).astype(np.int64) for name, chosen in parts.items()}

    def __getitem__(self, number: int) -> Case:
        row, path = self.rows[number], self._path(number)
        if path is None:
            return Case(row.image, *self._prepare(number))
        if not path.exists():
            write_with(path, lambda temporary: torch.save(list(self._prepare(number)), temporary))
        try:
            return Case(row.image, *_load(path))
        except (OSError, RuntimeError, ValueError):  # damaged, or dropped by another process meanwhile
            path.unlink(missing_ok=True)
            return Case(row.image, *self._prepare(number))

    def geometry(self, number: int) -> Geometry:
        """The grid on which a case was scanned: predictions go back to it."""
        return open_volume(self.folder / self.rows[number].image, self.rows[number].image).geometry

    def organ(self, number: int) -> np.ndarray:
        """The drawn organ as bool, in the array order of the mask's file."""
        row = self.rows[number]
        return np.isin(open_volume(self.folder / row.mask, row.mask).read(), self.config.foreground)

    def _prepare(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        pulse.beat()
        row = self.rows[number]
        scan, drawn = (open_volume(self.folder / name, name) for name in (row.image, row.mask))
        judge_size(scan, self.preprocessing.spacing)
        image = self.preprocessing.image(scan.read(), scan.geometry)
        mask = self.preprocessing.mask(self.organ(number), drawn.geometry, image)
        if not mask.any():
            spacing = self.preprocessing.spacing
            raise UserError(f"{row.mask}: no voxel of the organ is left at {spacing} mm: choose a finer spacing")
        return image.as_tensor().contiguous(), mask, torch.as_tensor(image.affine)

    def _path(self, number: int) -> Path | None:
        """Where a prepared case lies: its name follows from the content of its files, its folder from the settings."""
        if self.root is None:
            return None
        settings = [VERSION, asdict(self.preprocessing), self.config.foreground, monai.__version__]
        facts = self.facts[number]
        return (
            self.root / FOLDER / _digest(settings) / f"{_digest([facts.content, facts.mask_content, facts.grids])}.pt"
        )

    def prepare(self) -> None:
        """Bring every case into the cache, so that the first epoch is as fast as the others."""
        for number in range(len(self)):
            self[number]

    def prune(self) -> None:
        """Drop prepared cases that the folder no longer has, and those of the settings used longest ago."""
        paths = {self._path(number) for number in range(len(self))} if self.root else set()
        here = next((path.parent for path in paths if path), None)
        if here is None or not here.parent.is_dir():
            return
        with suppress(OSError):  # another process may be at it, too
            for path in here.glob("*.pt"):
                old = time.time() - path.stat().st_mtime > DAY
                if path not in paths and (old or not path.name.startswith(".")):
                    path.unlink(missing_ok=True)
            others = sorted((path for path in here.parent.iterdir() if path != here), key=lambda p: -p.stat().st_mtime)
            for path in others[KEPT:]:
                shutil.rmtree(path, ignore_errors=True)


def load_volume_site(
    folder: Path | str, preprocessing: Preprocessing | None = None, cache: Path | None = None
) -> VolumeSite:
    """Check a site folder of volumes; each case is resampled when it is first asked for, then read from the cache.

    The folds are drawn at the first call and kept in `folds.csv`. `cache` overrides where the prepared volumes lie.
    Raises `ProblemList` with every problem found.
    """
    folder = Path(folder)
    found = inspect_volumes(folder, cache)
    if found.problems or found.config is None:
        raise ProblemList(found.problems)
    root = cache_root(folder, cache)
    if not all(row.split == "test" or row.fold for row in found.rows):
        keep_drawn(folder, root, lambda place: write_folds(place, found.rows, found.places, found.stored))
    preprocessing = preprocessing or Preprocessing()
    site = VolumeSite(folder, found.config, found.rows, found.facts, found.places, preprocessing, root)
    site.prune()
    return site


def _load(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    image, mask, affine = torch.load(path, mmap=True, weights_only=True)
    return image, mask, affine


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
