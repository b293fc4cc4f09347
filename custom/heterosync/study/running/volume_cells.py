"""The volumes of a cross-validation: site folders, written or linked once, whose folds all experiments share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from heterosync.data.scenario import RECORD
from heterosync.data.scenario_tables import UNSEEN
from heterosync.data.site_yaml import CONFIG, VOLUMES
from heterosync.data.volume_check import VolumeInspection, inspect_volumes
from heterosync.data.volume_folds import sizes
from heterosync.errors import ProblemList, UserError
from heterosync.files import explained, new_folder, read_json, write_json, write_text
from heterosync.study.layout import DATA, NO_LEVEL, RunSpec
from heterosync.study.running.cell import sizes_in_words
from heterosync.study.running.plan import MethodEntry, digest_of
from heterosync.study.running.volume_plan import ENSEMBLE, FOLD, FROM, VolumePlan, source_of

#: How often a case is segmented for validation in an epoch: the received model, and the trained one.
VALIDATIONS = 2
#: A forward pass as a share of a training step [own measurement].
FORWARD = 1 / 3


@dataclass(frozen=True)
class VolumeCell:
    """One cross-validation. places: site -> case by case its fold, or 0 where it is held out; extent: mm along x, y, z
    of a volume, about."""

    scenario: str
    repeat: int
    seed: int
    folds: int
    places: dict[str, Sequence[int]]
    extent: tuple[float, float, float]
    level: None = None

    def folder(self, study: Path | str) -> Path:
        return Path(study) / DATA / self.scenario / NO_LEVEL / f"r{self.repeat}"

    @property
    def name(self) -> str:
        return f"{self.scenario} r{self.repeat}"

    @property
    def sites(self) -> list[str]:
        """Those that train, in the order of their names."""
        return sorted(set(self.places) - {UNSEEN})

    def images(self, site: str) -> tuple[int, int, int]:
        """How many cases train and validate where fold 1 does, and how many are held out."""
        places = list(self.places[site])
        held, validating = places.count(0), places.count(1)
        return len(places) - held - validating, validating, held

    def items(self, entry: MethodEntry, spec: RunSpec) -> float:
        """What a run takes in all, counted in patches of training steps."""
        settings = entry.made(spec.settings["training"]).training
        step = [max(1.0, side * (1 - settings.overlap)) for side in settings.patch]
        lengths = [length / settings.spacing for length in self.extent]
        windows = math.prod(
            1 + max(0, math.ceil((length - side) / by))
            for length, side, by in zip(lengths, settings.patch, step, strict=True)
        )
        forward = windows * FORWARD
        if ENSEMBLE in spec.settings:
            models = len(self.sites) if entry.made(spec.settings["training"]).personal else 1
            held = sum(list(places).count(0) for places in self.places.values())
            return models * self.folds * held * forward
        trained, validated, held = (sum(counts) for counts in zip(*map(self.images, self.sites), strict=True))
        epoch = trained * settings.crops + VALIDATIONS * validated * forward
        return settings.rounds * settings.local_epochs * epoch + 2 * held * forward


class VolumeData:
    """The cells of a plan, one per repeat, and the means to write them. Raises `ProblemList` with everything that is
    wrong with the site folders."""

    #: Patches in the batch that is timed for an estimate: BatchNorm needs two.
    timed = 2

    def __init__(self, plan: VolumePlan):
        self.plan = plan
        self._found = {site: inspect_volumes(folder) for site, folder in plan.folders().items()}
        problems = [line for site, found in self._found.items() for line in self._problems_of(site, found)]
        if problems:
            raise ProblemList(problems)
        places, extent = self._drawn() if plan.synthetic else self._there()
        self.cells = [
            VolumeCell(str(plan.source["kind"]), repeat, seed, plan.folds, places, extent)
            for repeat, seed in enumerate(plan.seeds)
        ]

    def _problems_of(self, site: str, found: VolumeInspection) -> list[str]:
        if found.problems or found.config is None:
            return [f"{site}: {line}" for line in found.problems]
        if site == UNSEEN:
            return [] if not any(found.places) else [f"{site}: a challenge set is held out: give every row split test"]
        if found.config.folds != self.plan.folds:
            return [f"{site}: {CONFIG} has folds: {found.config.folds}, the plan {self.plan.folds}: make them equal"]
        if 0 not in found.places:
            return [f"{site}: no case is held out for the test: give some rows split test"]
        return []

    def _drawn(self) -> tuple[dict[str, Sequence[int]], tuple[float, float, float]]:
        from heterosync.data.volume_phantoms import HEIGHT
        from heterosync.data.volume_scanners import SCANNERS

        cases, side = self.plan.source["cases"], float(self.plan.source["field_of_view"])
        places = [place for place, count in enumerate(sizes(cases, self.plan.folds)) for _ in range(count)]
        sites = {site: [0] * cases if site == UNSEEN else places for site in SCANNERS}
        return dict(sites), (side, side, HEIGHT)

    def _there(self) -> tuple[dict[str, Sequence[int]], tuple[float, float, float]]:
        facts = [case for found in self._found.values() for case in found.facts]
        lengths = [sorted(n * step for n, step in zip(one.shape, one.spacing, strict=True)) for one in facts]
        z, x, y = (sum(length) / len(facts) for length in zip(*lengths, strict=True))
        return {site: found.places for site, found in self._found.items()}, (x, y, z)

    def request(self, cell: VolumeCell) -> dict[str, Any]:
        """All that decides on the volumes of a cell and their folds, as plain values."""
        if self.plan.synthetic:
            return {**self.plan.source, "folds": cell.folds, "seed": cell.seed}
        return {"folds": cell.folds, "sites": self._cases}

    @cached_property
    def _cases(self) -> dict[str, Any]:
        """Site -> what its masks mark as the organ, and case by case its name, place and content: a study may move
        with its volumes, and goes on with no others."""
        return {
            site: {
                "foreground": list(found.config.foreground) if found.config else [],
                "cases": [
                    [row.image, place, facts.content, facts.mask_content, facts.grids]
                    for row, place, facts in zip(found.rows, found.places, found.facts, strict=True)
                ],
            }
            for site, found in self._found.items()
        }

    def runs(self) -> list[tuple[VolumeCell, MethodEntry, RunSpec]]:
        """Per cell, every method in fold 1, in fold 2, …, those that go on from another's model after it; then the
        ensemble of each."""
        ordered = sorted(self.plan.methods, key=lambda entry: source_of(entry) is not None)
        found: list[tuple[VolumeCell, MethodEntry, RunSpec]] = []
        for cell in self.cells:
            request = digest_of(self.request(cell))
            parts: dict[str, list[RunSpec]] = {entry.label: [] for entry in self.plan.methods}
            for fold in range(1, cell.folds + 1):
                for entry in ordered:
                    training = self.plan.training_of(entry, cell.seed, fold)
                    made = entry.made(training)
                    full = {"settings": made.settings.to_dict(), "training": made.training.to_dict()}
                    settings: dict[str, Any] = {"training": training}
                    source = source_of(entry)
                    if source:
                        settings[FROM] = parts[source][-1].path
                        full[FROM] = parts[source][-1].digest
                    digest = digest_of({"data": request, "method": entry.method, **full})
                    spec = self._spec(cell, entry.with_variant(f"{FOLD}{fold}"), settings, digest)
                    parts[entry.label].append(spec)
                    found.append((cell, entry, spec))
            for entry in self.plan.methods:
                folds = parts[entry.label]
                settings = {"training": folds[0].settings["training"], ENSEMBLE: [spec.path for spec in folds]}
                digest = digest_of([spec.digest for spec in folds])
                found.append((cell, entry, self._spec(cell, entry.with_variant(ENSEMBLE), settings, digest)))
        return found

    def _spec(self, cell: VolumeCell, entry: MethodEntry, settings: dict[str, Any], digest: str) -> RunSpec:
        place = (cell.scenario, NO_LEVEL, cell.repeat)
        return RunSpec(*place, entry.method, entry.variant, entry.label, {"method": entry.settings, **settings}, digest)

    def waits_for(self, spec: RunSpec) -> set[str]:
        """Paths of the runs that must have ended before: an ensemble's submodels, and the one that is gone on from."""
        return {*spec.settings.get(ENSEMBLE, ()), *([spec.settings[FROM]] if FROM in spec.settings else [])}

    def overview(self) -> tuple[list[str], list[list[str]]]:
        cell = self.cells[0]
        held = {site: cell.images(site) for site in [*cell.sites, *([UNSEEN] if UNSEEN in cell.places else [])]}
        return ["scenario", "volumes per site (of these test)", "folds"], [
            [cell.scenario, sizes_in_words(held), str(cell.folds)]
        ]

    def problems(self, study: Path) -> list[str]:
        """What keeps the cells from being written; what the folders lack was told at the start."""
        return []

    def is_written(self, cell: VolumeCell, study: Path) -> bool:
        """Raises `UserError` when volumes of another plan stand there."""
        record = cell.folder(study) / RECORD
        if not record.is_file():
            return False
        if read_json(record).get("study") != digest_of(self.request(cell)):
            raise UserError(f"{cell.folder(study)} holds volumes of another plan: choose another --out")
        return True

    def write(self, cell: VolumeCell, study: Path) -> Path:
        """Make the phantoms, or links to the site folders; draw the folds, which stay; prepare every case."""
        folder = cell.folder(study)
        if not self.is_written(cell, study):
            with new_folder(folder) as made:
                (self._make if self.plan.synthetic else self._link)(cell, made)
                about = {"scenario": cell.scenario, "seed": cell.seed, "folds": cell.folds, "anchors_differ": False}
                about |= {"sites": list(cell.places), "study": digest_of(self.request(cell))}
                write_json(made / RECORD, about)
        self._prepare(cell, folder)
        return folder

    def _make(self, cell: VolumeCell, folder: Path) -> None:
        from heterosync.data.volume_phantoms import make_phantom_alliance

        source = self.plan.source
        make_phantom_alliance(folder, cell.seed, source["cases"], source["field_of_view"])
        for site in cell.sites:
            write_text(folder / site / CONFIG, f"task: {VOLUMES}\nfolds: {cell.folds}\n")

    def _link(self, cell: VolumeCell, folder: Path) -> None:
        for site, path in self.plan.folders().items():
            with explained(folder / site):
                (folder / site).symlink_to(path.resolve(), target_is_directory=True)

    def _prepare(self, cell: VolumeCell, folder: Path) -> None:
        """Resampled once here, not by several runs at the same time."""
        from heterosync.data.volume_dataset import load_volume_site
        from heterosync.data.volume_preprocess import Preprocessing

        chosen = {
            (training.spacing, training.interpolation)
            for entry in self.plan.methods
            for training in [entry.made(self.plan.training_of(entry, cell.seed, 1)).training]
        }
        for site in cell.places:
            for settings in sorted(chosen):
                load_volume_site(folder / site, Preprocessing(*settings)).prepare()
