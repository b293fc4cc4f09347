"""Check the written site folders of a scenario against its record: sizes, leaks between splits and sites, anchors.

They read the folders as the training does, whoever drew the splits.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heterosync.data.check import Inspection, inspect_site
from heterosync.data.scenario import RECORD
from heterosync.data.scenario_plan import target_sizes
from heterosync.data.scenario_tables import UNSEEN, SiteRow
from heterosync.data.site import SPLITS
from heterosync.errors import UserError
from heterosync.files import read_json


@dataclass
class ScenarioInspection:
    """problems: one line each. images: per site, per split, (negative, positive). digest: SHA-256 over site, content,
    label and split of every image: equal for equal scenarios, another one for every repeat. record: scenario.json."""

    record: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    images: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    digest: str = ""


def check_scenario(folder: Path | str, need_anchor: bool = True) -> ScenarioInspection:
    """Read every image of every site below `folder`. Raises `UserError` when there is no record of a scenario."""
    folder = Path(folder)
    record = read_json(folder / RECORD)
    try:
        table = [_site_row(row) for row in record["table"]]
        found = ScenarioInspection(record)
        sites = {
            site: inspect_site(folder / site, None, need_anchor=need_anchor and (site != UNSEEN or _has_anchor(folder)))
            for site in record["sites"]
        }
        found.problems += [f"{site}: {line}" for site, seen in sites.items() for line in seen.problems]
        if found.problems:
            return found
        found.images = {site: _counts(seen) for site, seen in sites.items()}
        found.digest = _digest(sites)
        grouped = record["group"] == "patient"
        shared = any(row.shared for row in table)
        for site, seen in sites.items():
            found.problems += _size_problems(folder / site, site, seen, table, grouped)
        found.problems += _leaks(sites, shared, grouped) + _anchor_problems(sites, record["anchors_differ"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / RECORD} is no record of a scenario: write the scenario again") from error
    return found


def _site_row(row: dict[str, Any]) -> SiteRow:
    return SiteRow(**{**row, "test": None if row["test"] is None else tuple(row["test"])})


def _has_anchor(folder: Path) -> bool:
    return (folder / UNSEEN / "anchor").is_dir()


def _counts(seen: Inspection) -> dict[str, tuple[int, int]]:
    counts = Counter((split, row.label) for split, row in zip(seen.splits, seen.rows, strict=True))
    return {split: (counts[split, 0], counts[split, 1]) for split in SPLITS}


def _digest(sites: dict[str, Inspection]) -> str:
    lines = sorted(
        f"{site},{content},{row.label},{split}\n"
        for site, seen in sites.items()
        for row, content, split in zip(seen.rows, _content(seen), seen.splits, strict=True)
    )
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _content(seen: Inspection) -> list[str]:
    return [str(content) for content in seen.pictures.content] if seen.pictures else []


def _size_problems(folder: Path, site: str, seen: Inspection, table: list[SiteRow], grouped: bool) -> list[str]:
    """Exact counts of the table; exact splits too, unless whole patients had to be kept together."""
    rows = [row for row in table if row.site == site]
    if not rows:  # `unseen` from what remained
        return []
    assert seen.config is not None
    problems = []
    counts = _counts(seen)
    patients = grouped and any(row.patient for row in seen.rows)
    for label, name in enumerate(seen.config.labels):
        wanted, held = sum(row.counts[label] for row in rows), sum(counts[split][label] for split in SPLITS)
        if wanted != held:
            problems.append(f"{site}: {held} images with label '{name}', but the scenario has {wanted}")
        elif site != UNSEEN and not patients:
            sizes, drawn = target_sizes(rows, label), [counts[split][label] for split in SPLITS]
            problems += [
                f"{site}: {drawn[i]} {split} images with label '{name}', but the scenario has {sizes[i]}"
                for i, split in enumerate(SPLITS)
                if drawn[i] != sizes[i]
            ]
    return problems


def _leaks(sites: dict[str, Inspection], shared: bool, grouped: bool) -> list[str]:
    """Images and patients that are in two splits of the alliance, or, unless the scenario shares them, in two sites."""
    places: dict[tuple[str, str], set[tuple[str, str]]] = {}
    for site, seen in sites.items():
        for row, content, split in zip(seen.rows, _content(seen), seen.splits, strict=True):
            places.setdefault(("image", content), set()).add((site, split))
            if grouped and row.patient:
                places.setdefault(("patient", row.patient), set()).add((site, split))
    leaks: Counter[str] = Counter()
    for (what, _), held in places.items():
        first, *others = sorted(held)
        for other in others:
            if other[1] != first[1]:
                leaks[f"{what}s are in {first[1]} of {first[0]} and in {other[1]} of {other[0]}"] += 1
            elif not shared and other[0] != first[0]:
                leaks[f"{what}s are in {first[0]} and in {other[0]}"] += 1
    return [f"{count} {text}: write the scenario again" for text, count in sorted(leaks.items())]


def _anchor_problems(sites: dict[str, Inspection], differ: bool) -> list[str]:
    packs = {site: seen.anchor for site, seen in sites.items() if seen.anchor is not None}
    problems = []
    for site, seen in sites.items():
        for holder, pack in packs.items():
            common = set(pack.content) & set(_content(seen))
            if common:
                problems.append(f"{len(common)} images of {site} are in the anchor pack of {holder}: they must differ")
    digests = {pack.digest for pack in packs.values()}
    if packs and differ and len(digests) == 1:
        problems.append("the sites' anchor packs are all the same, but the scenario gives them different ones")
    if not differ and len(digests) > 1:
        problems.append("the sites' anchor packs differ: give every site the same copy")
    return problems
