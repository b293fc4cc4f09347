"""The data of a study: one folder of site folders per scenario, level and repeat, shared by all of its runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from heterosync.data.anchor import read_anchor_info, write_anchor
from heterosync.data.anchor_controls import controlled
from heterosync.data.anchor_tables import (
    AnchorRow,
    anchors_of_sites,
    read_anchor_table,
    sources_from,
    synthetic_sources,
    write_anchors,
)
from heterosync.data.collection import Collection
from heterosync.data.dataset import load_site
from heterosync.data.scenario import RECORD, check_anchor, write_scenario
from heterosync.data.scenario_plan import draw_balanced, plan_scenario
from heterosync.data.scenario_tables import UNSEEN, SiteRow, on_any_domain, read_table, scaled, table_levels
from heterosync.data.sources import open_collection
from heterosync.data.synthetic import (
    ANCHOR_CLASSES,
    ANCHOR_DOMAIN,
    ANCHOR_PER_CLASS,
    SyntheticSpec,
    synthetic_collection,
    synthetic_images,
)
from heterosync.errors import ProblemList, UserError
from heterosync.files import content_digest, explained, read_json
from heterosync.study.layout import RunSpec, level_folder
from heterosync.study.running.cell import Cell, sizes_in_words
from heterosync.study.running.plan import SYNTHETIC, MethodEntry, Plan, ScenarioEntry, digest_of


class StudyData:
    """Every cell of a plan, and the means to write it. Raises `ProblemList` for tables that do not fit the plan."""

    #: Images in the batch that is timed for an estimate.
    timed = 8

    def __init__(self, plan: Plan):
        self.plan = plan
        self.cells: list[Cell] = []
        problems: list[str] = []
        for entry in plan.scenarios:
            table = self._table(entry.scenario)
            for level in entry.levels or table_levels(table) or (None,):
                try:
                    self.cells += self._cells_of(entry, level, read_table(table, level))
                except UserError as error:
                    problems += [f"scenario {entry.name}: {line}" for line in str(error).splitlines()]
        if problems:
            raise ProblemList(list(dict.fromkeys(problems)))

    def _cells_of(self, entry: ScenarioEntry, level: str | None, rows: Sequence[SiteRow]) -> list[Cell]:
        scale = self.plan.scale if entry.scale is None else entry.scale
        rows = scaled(on_any_domain(rows) if entry.any_domain else rows, scale)
        anchor, anchors = self._anchor(entry), {}
        if anchor and anchor["kind"] == "table":
            sites = list(dict.fromkeys([*(row.site for row in rows), UNSEEN]))
            anchors = anchors_of_sites(read_anchor_table(self._table(anchor["table"])), sites, scale)
        sizes = {sum(row.counts) for site, row in anchors.items() if site != UNSEEN} or {self._anchor_size(anchor)}
        if len(sizes) > 1 and self.plan.counts_steps(entry):
            raise UserError("its anchor packs differ in size, and match_steps counts the steps of one: leave one out")
        return [
            Cell(entry, level, repeat, seed, tuple(rows), anchors, max(sizes))
            for repeat, seed in enumerate(self.plan.seeds)
        ]

    def request(self, cell: Cell) -> dict[str, Any]:
        """All that decides on the images of a cell, as plain values."""
        spec = {"synthetic": asdict(self._spec)} if self.plan.synthetic else {}
        return {
            "table": [asdict(row) for row in cell.table],
            "anchors": {site: asdict(row) for site, row in cell.anchors.items()},
            "anchor": self._by_content(self._anchor(cell.entry)),
            "n_anchor": cell.n_anchor,
            "source": self._by_content(self.plan.source),
            "seed": cell.seed,
            "group": self.plan.group,
            "unseen": self.plan.unseen,
            **spec,
        }

    def runs(self) -> list[tuple[Cell, MethodEntry, RunSpec]]:
        """All runs of the plan, cell by cell, methods in the order of the plan."""
        found = []
        for cell in self.cells:
            pooled = sum(max(cell.images(site)[0], cell.n_anchor) for site in cell.sites)
            request = digest_of(self.request(cell))
            for entry in self.plan.entries(cell.entry, cell.n_anchor, pooled):
                training = {**self.plan.common(), **entry.training, "seed": cell.seed}
                made = entry.made(training)
                full = {"settings": made.settings.to_dict(), "training": made.training.to_dict()}
                spec = RunSpec(
                    cell.entry.name,
                    level_folder(cell.level),
                    cell.repeat,
                    entry.method,
                    entry.variant,
                    entry.label,
                    {"method": dict(entry.settings), "training": training},
                    digest_of({"data": request, "method": entry.method, **full}),
                )
                found.append((cell, entry, spec))
        return found

    def waits_for(self, spec: RunSpec) -> set[str]:
        """Paths of the runs that must have ended before: none."""
        return set()

    def overview(self) -> tuple[list[str], list[list[str]]]:
        """What the cells of the first repeat hold, for a table."""
        rows = []
        for cell in self.cells:
            if not cell.repeat:
                sizes = {site: cell.images(site) for site in cell.sites}
                rows.append([cell.name.rsplit(" ", 1)[0], sizes_in_words(sizes), str(cell.n_anchor)])
        return ["scenario", "images per site (of these test)", "anchor images"], rows

    def problems(self, study: Path) -> list[str]:
        """What keeps the cells that are not yet written from being written: missing images, bad anchor packs."""
        problems: list[str] = []
        for cell in self.cells:
            if self._written(cell, study) == digest_of(self.request(cell)):
                continue
            try:
                collection = self._collection(cell, draw=False)
                if self.plan.synthetic:
                    for domain in dict.fromkeys(row.domain for row in cell.table):
                        synthetic_images(domain, (), cell.seed, self._spec)  # is there such a domain?
                plan_scenario(collection, cell.table, cell.seed, self.plan.group, self.plan.unseen)
                self._check_anchor(cell, collection)
            except UserError as error:
                name = cell.name.rsplit(" ", 1)[0]  # the same shortage in every repeat is one problem
                problems += [f"scenario {name}: {line}" for line in str(error).splitlines()]
        return list(dict.fromkeys(problems))

    def is_written(self, cell: Cell, study: Path) -> bool:
        """Raises `UserError` when images of another plan stand there."""
        digest = self._written(cell, study)
        if digest not in (None, digest_of(self.request(cell))):
            raise UserError(f"{cell.folder(study)} holds images of another plan: choose another --out")
        return digest is not None

    def _written(self, cell: Cell, study: Path) -> str | None:
        """The digest of the images that stand there."""
        record = cell.folder(study) / RECORD
        return str(read_json(record).get("study")) if record.is_file() else None

    def write(self, cell: Cell, study: Path) -> Path:
        """Write the site folders, draw their splits and decode their images, if that has not been done."""
        folder = cell.folder(study)
        if not self.is_written(cell, study):
            about = {"scenario": cell.entry.scenario, "level": cell.level, "study": digest_of(self.request(cell))}
            with tempfile.TemporaryDirectory() as temporary, explained(folder):
                collection = self._collection(cell)
                packs = self._packs(cell, Path(temporary))
                options: dict[str, Any] = {"seed": cell.seed, "unseen": self.plan.unseen, "group": self.plan.group}
                write_scenario(collection, cell.table, folder, packs, about=about, **options)
        for site in sorted(path.parent for path in folder.glob("*/site.yaml")):
            load_site(site, self.plan.image_size(), self.plan.common().get("channels", 3), need_anchor=False)
        return folder

    # -- images --------------------------------------------------------------------------------------------------------

    def _table(self, name: str) -> str:
        """A file beside the plan, or else the name of a table that comes with heterosync."""
        path = Path(self.plan.base) / name
        return str(path) if path.is_file() else name

    def _path(self, name: str) -> str:
        return str(Path(self.plan.base) / name)

    def _by_content(self, named: dict[str, Any] | None) -> dict[str, Any] | None:
        """A source as a plan names it, with what stands at its paths in place of these: a study may move with its
        images, and goes on with no others."""
        if named is None:
            return None
        found = {key: self._content(value) if key == "path" else value for key, value in named.items()}
        if named.get("sources"):
            found["sources"] = {name: self._content(path) for name, path in named["sources"].items()}
        return found

    def _content(self, name: str) -> str:
        if name not in self._contents:
            self._contents[name] = content_digest(Path(self._path(name)))
        return self._contents[name]

    @cached_property
    def _contents(self) -> dict[str, str]:
        return {}

    @cached_property
    def _spec(self) -> SyntheticSpec:
        own = {name: value for name, value in self.plan.source.items() if name != "kind"}
        try:
            return SyntheticSpec(**{"image_size": self.plan.image_size(), **own})
        except TypeError as error:
            raise UserError(
                f"source: visibility, noise and variation are numbers, image_size a whole one: {error}"
            ) from None

    @cached_property
    def _source(self) -> Collection:
        options = {name: value for name, value in self.plan.source.items() if name != "path"}
        return open_collection(self._path(self.plan.source["path"]), **options)

    def _collection(self, cell: Cell, draw: bool = True) -> Collection:
        if not self.plan.synthetic:
            return self._source
        return synthetic_collection(cell.table, cell.seed, self._spec, draw=draw)

    # -- anchor packs --------------------------------------------------------------------------------------------------

    def _anchor(self, entry: ScenarioEntry) -> dict[str, Any] | None:
        return entry.anchor or self.plan.anchor

    def _anchor_size(self, anchor: dict[str, Any] | None) -> int:
        if anchor is None:
            return 0
        if anchor["kind"] == "pack":
            try:
                return read_anchor_info(self._path(anchor["path"])).n
            except UserError as error:
                raise UserError(f"anchor {anchor['path']}: {error}") from error
        return 2 * int(anchor.get("per_class", ANCHOR_PER_CLASS if anchor["kind"] == SYNTHETIC else 500))

    def _check_anchor(self, cell: Cell, collection: Collection) -> None:
        anchor = self._anchor(cell.entry)
        if anchor and anchor["kind"] == "pack":
            check_anchor(self._path(anchor["path"]), collection)
        if anchor and anchor["kind"] == "source":
            draw_balanced(self._anchor_source(anchor), cell.n_anchor // 2, cell.seed)
        if anchor and anchor["kind"] == "table":
            self._opener(cell, anchor)

    def _packs(self, cell: Cell, folder: Path) -> Path | dict[str, Path] | None:
        anchor = self._anchor(cell.entry)
        if anchor is None:
            return None
        if anchor["kind"] == "pack":
            return Path(self._path(anchor["path"]))
        if anchor["kind"] == "table":
            opener, size = self._opener(cell, anchor), anchor.get("size")
            return write_anchors(cell.anchors, folder, opener, cell.seed, size, anchor.get("control"))
        if anchor["kind"] == SYNTHETIC:
            labels = np.repeat([0, 1], cell.n_anchor // 2)
            images = list(synthetic_images(ANCHOR_DOMAIN, labels.tolist(), cell.seed, self._anchor_spec()))
            name, classes = "synthetic chest opacity", ANCHOR_CLASSES
        else:
            drawn = draw_balanced(self._anchor_source(anchor), cell.n_anchor // 2, cell.seed)
            images, labels, classes = [drawn.image(i) for i in range(len(drawn))], drawn.labels, drawn.classes
            name = f"{drawn.name}: {classes[0]} or {classes[1]}"
        images, labels, name = controlled(images, labels, name, anchor.get("control"), cell.seed)
        write_anchor(folder / "anchor", images, labels, name, *classes)
        return folder / "anchor"

    def _anchor_spec(self) -> SyntheticSpec:
        return self._spec if self.plan.synthetic else SyntheticSpec(image_size=self.plan.image_size())

    def _anchor_source(self, anchor: dict[str, Any]) -> Collection:
        key = digest_of(anchor)
        if key not in self._opened:
            options = {n: v for n, v in anchor.items() if n not in ("path", "per_class", "format", "kind", "control")}
            path = self._path(anchor["path"])
            self._opened[key] = open_collection(path, kind=anchor.get("format"), **options)
        return self._opened[key]

    @cached_property
    def _opened(self) -> dict[str, Collection]:
        return {}

    def _opener(self, cell: Cell, anchor: dict[str, Any]) -> Callable[[AnchorRow], Collection]:
        rows = cell.anchors.values()
        if self.plan.synthetic:
            return synthetic_sources(rows, cell.seed, self._anchor_spec())
        return sources_from(
            rows, {name: Path(self._path(path)) for name, path in (anchor.get("sources") or {}).items()}
        )
