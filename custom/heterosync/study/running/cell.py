"""The data that runs of a study on pictures share: one scenario at one level in one repeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from heterosync.data.anchor_tables import AnchorRow
from heterosync.data.scenario_plan import target_sizes
from heterosync.data.scenario_tables import UNSEEN, SiteRow
from heterosync.study.layout import DATA, RunSpec, level_folder
from heterosync.study.running.plan import MethodEntry, ScenarioEntry

#: Validation, decoding, fusion and tests beside the training steps, as a share of these [own measurement].
BESIDE = 0.25


@dataclass(frozen=True)
class Cell:
    """One scenario at one level in one repeat. table: the rows of its sites, scaled; anchors: the row of each site
    where an anchor table decides; n_anchor: images of the anchor pack, 0 without one, of the largest where they
    differ."""

    entry: ScenarioEntry
    level: str | None
    repeat: int
    seed: int
    table: tuple[SiteRow, ...]
    anchors: dict[str, AnchorRow]
    n_anchor: int

    def folder(self, study: Path | str) -> Path:
        return Path(study) / DATA / self.entry.name / level_folder(self.level) / f"r{self.repeat}"

    @property
    def scenario(self) -> str:
        return self.entry.name

    @property
    def name(self) -> str:
        return f"{self.entry.name}{'' if self.level is None else f' {self.level}'} r{self.repeat}"

    @property
    def sites(self) -> list[str]:
        """Those that train, in the order of their names."""
        return sorted({row.site for row in self.table} - {UNSEEN})

    @property
    def anchors_differ(self) -> bool:
        return len({self.anchors[site] for site in self.sites if site in self.anchors}) > 1

    def images(self, site: str) -> tuple[int, int, int]:
        """How many train, validate and test at a site, as far as whole patients allow."""
        rows = [row for row in self.table if row.site == site]
        negative, positive = target_sizes(rows, 0), target_sizes(rows, 1)
        return negative[0] + positive[0], negative[1] + positive[1], negative[2] + positive[2]

    def steps(self, entry: MethodEntry, spec: RunSpec) -> int:
        """Items (images, or pairs of them) that all local epochs of a run show, those of all sites together."""
        made = entry.made(spec.settings["training"])
        least = max(made.training.match_steps, self.n_anchor if made.uses_anchor else 0)
        counts = [self.images(site)[0] for site in self.sites]
        if made.split:  # every site makes as many steps as the largest
            least = max(least, *counts)
        epoch = max(sum(counts), least) if made.pooled else sum(max(count, least) for count in counts)
        return epoch * made.training.rounds * made.training.local_epochs

    def items(self, entry: MethodEntry, spec: RunSpec) -> float:
        """What a run takes in all, counted in items of training steps."""
        return self.steps(entry, spec) * (1 + BESIDE)


def sizes_in_words(sizes: Mapping[str, tuple[int, int, int]]) -> str:
    """How many images every site has, and how many of them test; the range alone where the list would be long."""
    listed = ", ".join(f"{site} {sum(size)} ({size[2]})" for site, size in sizes.items())
    if len(listed) < 70:
        return listed
    totals = sorted(sum(size) for size in sizes.values())
    tests = sorted(size[2] for size in sizes.values())
    return f"{len(sizes)} sites, {totals[0]} to {totals[-1]} ({tests[0]} to {tests[-1]})"
