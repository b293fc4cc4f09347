"""One scenario of a study: what its figures and tables draw from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from heterosync.data.site import read_manifest, read_site_config
from heterosync.errors import UserError
from heterosync.study.evidence.measures import Measurement, Summary
from heterosync.study.evidence.outcomes import Outcome, Study, by_series
from heterosync.study.layout import NO_LEVEL, UNSEEN
from heterosync.study.table import ABSENT

#: Levels that a figure of curves shows at most: the first, the middle and the last.
MOST_PARTS = 3


@dataclass(frozen=True, eq=False)
class Scenario:
    """What the figures of one scenario draw from. levels: in the order of the plan, `NO_LEVEL` alone where there are
    none; summaries: of the AUC."""

    study: Study
    name: str
    measurements: Sequence[Measurement]
    summaries: Mapping[tuple[str, str, str], Summary]
    reference: str

    @cached_property
    def series(self) -> dict[str, dict[str, dict[int, Outcome]]]:
        """Level -> label -> repeat -> outcome."""
        found = by_series(self.study)
        return {level: series for (scenario, level), series in found.items() if scenario == self.name}

    @property
    def levels(self) -> list[str]:
        return list(self.series)

    @property
    def has_levels(self) -> bool:
        return self.levels != [NO_LEVEL]

    @cached_property
    def labels(self) -> list[str]:
        """The reference first."""
        labels = list(dict.fromkeys(label for series in self.series.values() for label in series))
        return sorted(labels, key=lambda label: label != self.reference)

    @cached_property
    def sites(self) -> list[str]:
        """Those that train."""
        return list(dict.fromkeys(site for _, site, _ in self.summaries if site != UNSEEN))

    @cached_property
    def repeats(self) -> int:
        """The most that any method has."""
        return max((len(one.values) for one in self.summaries.values()), default=0)

    @property
    def has_unseen(self) -> bool:
        return any(site == UNSEEN for _, site, _ in self.summaries)

    @property
    def outcomes(self) -> Iterable[Outcome]:
        return (one for series in self.series.values() for runs in series.values() for one in runs.values())

    def values(self, level: str, site: str, label: str) -> list[float | None] | None:
        """AUC of every repeat; None where the method has no run."""
        summary = self.summaries.get((level, site, label))
        return None if summary is None else list(summary.values.values())

    def counts(self, level: str, site: str) -> tuple[str, str]:
        """Test images and positive ones of a repeat, in words: a range where the repeats differ."""
        found = [m.values for m in self.measurements if m.spec.level == level and m.site == site]
        ranges = []
        for name in ("n", "n_positive"):
            known = sorted({values[name] for values in found})
            ranges.append(f"{known[0]}" if len(known) == 1 else f"{known[0]}–{known[-1]}" if known else ABSENT)
        return ranges[0], ranges[1]

    def test_images(self, level: str, site: str) -> str:
        return "test: {} images, {} positive".format(*self.counts(level, site))

    def at_level(self, level: str) -> str:
        """`, level 20`; nothing where there are none."""
        return f", level {level}" if self.has_levels else ""

    def parts(self) -> dict[str, str]:
        """At most three levels and their names."""
        chosen = self.levels
        if len(chosen) > MOST_PARTS:
            chosen = [chosen[0], chosen[len(chosen) // 2], chosen[-1]]
        return {level: f"level {level}" if self.has_levels else self.name for level in chosen}


def image_counts(scenario: Scenario) -> tuple[dict[str, dict[str, tuple[int, int]]], bool]:
    """Level -> site -> (negative, positive) images of the first repeat, and whether these are all images: where the
    site folders are gone, only the test images are known."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for level, series in scenario.series.items():
        first = next(one for runs in series.values() for one in runs.values())
        folder = first.spec.data(scenario.study.folder)
        try:
            found[level] = {site.parent.name: _labels(site.parent) for site in sorted(folder.glob("*/site.yaml"))}
        except UserError:
            found[level] = {}
        if not found[level]:
            return _test_counts(scenario), False
    return found, True


def _labels(site: Path) -> tuple[int, int]:
    labels = [row.label for row in read_manifest(site, read_site_config(site))]
    return labels.count(0), labels.count(1)


def _test_counts(scenario: Scenario) -> dict[str, dict[str, tuple[int, int]]]:
    found: dict[str, dict[str, tuple[int, int]]] = {}
    for m in scenario.measurements:
        n, positive = m.values["n"], m.values["n_positive"]
        found.setdefault(m.spec.level, {}).setdefault(m.site, (n - positive, positive))
    return found


def scenarios_of(
    study: Study, measurements: Sequence[Measurement], summaries: Sequence[Summary], reference: str
) -> list[Scenario]:
    """Every scenario that has a finished run, in the order of the plan."""
    return [
        Scenario(
            study,
            name,
            [one for one in measurements if one.spec.scenario == name],
            {(s.level, s.site, s.label): s for s in summaries if s.scenario == name and s.metric == "auc"},
            reference,
        )
        for name in dict.fromkeys(one.spec.scenario for one in study.outcomes)
    ]
