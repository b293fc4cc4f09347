"""Draw the images of every site of a scenario table: exact counts, nothing in two splits, one draw per seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from heterosync.data.collection import Collection
from heterosync.data.scenario_tables import ANY_DOMAIN, UNSEEN, SiteRow
from heterosync.data.site import SPLITS
from heterosync.data.splits import split_rows, split_sizes
from heterosync.errors import ProblemList, UserError, nearest


@dataclass(frozen=True)
class ScenarioPlan:
    """Which images (rows of the collection) each site gets; `unseen` is one of the names where images remain.

    splits: the split of each of these images, for the sites whose table fixes it; the others draw theirs themselves.
    """

    rows: dict[str, np.ndarray]
    left_out: int
    splits: dict[str, list[str]]

    def describe(self, collection: Collection) -> list[str]:
        """One line per site and domain: name, domain, counts per class; and per split where the table fixes it."""
        lines = []
        for site, rows in self.rows.items():
            role = " (test only)" if site == UNSEEN else ""
            domains = [collection.domains[row] for row in rows]
            for domain in sorted(set(domains)):
                place = f", {domain}" if domain else ""
                own = rows[[name == domain for name in domains]]
                lines.append(f"{site}{role}{place}: {_class_counts(collection, own)}")
            for split in SPLITS if site in self.splits else ():
                own = rows[[name == split for name in self.splits[site]]]
                lines.append(f"{site}, {split}: {len(own)} images: {_class_counts(collection, own)}")
        held = np.concatenate(list(self.rows.values())) if self.rows else np.array([])
        if len(held) > len(np.unique(held)):
            lines.append(f"in more than one site, in the same split: {len(held) - len(np.unique(held))} images")
        if self.left_out:
            lines.append(f"in no site: {self.left_out} images")
        return lines


def plan_scenario(
    collection: Collection, table: Sequence[SiteRow], seed: int = 0, group: str = "patient", unseen: bool = True
) -> ScenarioPlan:
    """Draw the images of every site: without replacement, exact counts, the same for the same seed.

    group: "patient" lets no patient be in two sites (where patients are known), nor in two splits; "image" ignores
    patients, as the HeteroSync paper does.
    unseen: the images that no site got become the test-only site `unseen`, if they hold both classes and the table has
    no rows for it.
    Rows marked shared draw from one pool that is split first: two sites may hold one image (or patient), but only in
    the same split. Test sizes that the table gives are met exactly, with patients as closely as whole ones allow.
    Raises `ProblemList` naming site, domain, class and how many images are missing.
    """
    if group not in ("patient", "image"):
        raise UserError(f"group must be 'patient' or 'image', not '{group}'")
    draw = _Draw(collection, seed, collection.patients if group == "patient" else None)
    pool = draw.split_pool(table) if any(row.shared for row in table) else {}
    for row in table:
        if row.shared:
            draw.share(row, pool)
        else:
            draw.take(row)
    if draw.problems:
        raise ProblemList(draw.problems)
    rows = {site: np.array(sorted(taken), dtype=np.int64) for site, taken in draw.drawn.items() if taken}
    splits = {site: [pool[row] for row in rows[site]] for site in rows if pool and site != UNSEEN}
    for site in {row.site: 0 for row in table if row.test and not row.shared and row.site != UNSEEN}:
        splits[site] = draw.split_site(rows[site], [row for row in table if row.site == site])
    rest = np.sort(draw.order[draw.free])
    left_out = len(rest)
    if unseen and UNSEEN not in rows:
        patients = draw.patients
        kept = [i for i in rest if patients is None or patients[i] not in draw.owner]
        if len(set(collection.labels[kept])) == 2:  # one class alone tests nothing
            rows[UNSEEN] = np.array(kept, dtype=np.int64)
            left_out -= len(kept)
    return ScenarioPlan(rows, left_out, splits)


def draw_balanced(collection: Collection, per_class: int, seed: int = 0) -> Collection:
    """`per_class` images of each class, for an anchor pack. Raises `UserError` when a class has fewer."""
    return draw_counts(collection, (per_class, per_class), seed)


def draw_counts(collection: Collection, counts: tuple[int, int], seed: int = 0) -> Collection:
    """So many negative and positive images, for an anchor pack. Raises `UserError` when a class has fewer."""
    plan = plan_scenario(collection, [SiteRow("anchor", ANY_DOMAIN, *counts)], seed, "image", unseen=False)
    return collection.subset(plan.rows["anchor"])


class _Draw:
    """What was drawn so far: `free` (by `order`) is in no site, `owner` names the site of a patient."""

    def __init__(self, collection: Collection, seed: int, patients: list[str] | None):
        self.collection, self.seed, self.patients = collection, seed, patients
        self.order = _drawing_order(len(collection), patients, np.random.default_rng(seed))
        self.domains = np.array([domain.casefold() for domain in collection.domains])
        self.free = np.ones(len(collection), dtype=bool)
        self.owner: dict[str, str] = {}
        self.drawn: dict[str, list[int]] = {}
        self.problems: list[str] = []

    def candidates(self, row: SiteRow) -> np.ndarray:
        """The images of the row's domain, in drawing order; none is a problem."""
        place = np.full(len(self.order), row.domain == ANY_DOMAIN) | (self.domains == row.domain.casefold())
        if not place.any():
            self.problems.append(f"{row.site}: {_no_domain(self.collection, row.domain)}")
        return self.order[place[self.order]]

    def take(self, row: SiteRow) -> None:
        """Images that no other site has."""
        place = self.candidates(row)
        if not len(place):
            return
        free = np.zeros(len(self.order), dtype=bool)
        free[self.order[self.free]] = True
        for label, wanted in enumerate(row.counts):
            found = place[free[place] & (self.collection.labels[place] == label)]
            patients = self.patients
            if patients is not None:
                found = [i for i in found if self.owner.get(patients[i], row.site) == row.site]
                found.sort(key=lambda i: patients[i] not in self.owner)  # stable: patients of this site come first
            self._keep(row, label, found, wanted)

    def split_pool(self, table: Sequence[SiteRow]) -> dict[int, str]:
        """The split of every image of the domains that the table names: 60/10/30 by class, patients kept together."""
        wanted = {row.domain.casefold() for row in table}
        inside = [i for i in range(len(self.domains)) if ANY_DOMAIN in wanted or self.domains[i] in wanted]
        patients = None if self.patients is None else [self.patients[i] for i in inside]
        parts = split_rows(self.collection.labels[inside], patients, self.seed)
        return {inside[i]: split for split, rows in parts.items() for i in rows}

    def share(self, row: SiteRow, pool: dict[int, str]) -> None:
        """Each split from the pool's same split, without replacement within the site."""
        number = len(self.drawn)
        own = set(self.drawn.setdefault(row.site, []))
        candidates = [int(i) for i in self.candidates(row) if i not in own]
        order = np.random.default_rng([self.seed, number]).permutation(len(candidates))  # each site its own draw
        for label in (0, 1) if candidates else ():
            wanted = target_sizes([row], label)
            for split, size in zip(SPLITS, wanted, strict=True):
                shuffled = (candidates[j] for j in order)
                found = [i for i in shuffled if pool[i] == split and self.collection.labels[i] == label]
                self._keep(row, label, found, size, f" for {split}")

    def _keep(self, row: SiteRow, label: int, found: Sequence[int], wanted: int, use: str = "") -> None:
        if wanted > len(found):
            self.problems.append(self._shortage(row, label, wanted, len(found), use))
        taken = [int(i) for i in found[:wanted]]
        self.free &= ~np.isin(self.order, taken)
        if self.patients is not None:
            self.owner.update({self.patients[i]: row.site for i in taken})
        self.drawn.setdefault(row.site, []).extend(taken)

    def split_site(self, rows: np.ndarray, table: Sequence[SiteRow]) -> list[str]:
        """The split of each image of a site whose table gives the test sizes."""
        sizes = [target_sizes(table, label) for label in (0, 1)]
        patients = None if self.patients is None else [self.patients[i] for i in rows]
        parts = split_rows(self.collection.labels[rows], patients, self.seed, sizes=sizes)
        chosen = {int(i): split for split, members in parts.items() for i in members}
        return [chosen[i] for i in range(len(rows))]

    def _shortage(self, row: SiteRow, label: int, wanted: int, free: int, use: str) -> str:
        place = "" if row.domain == ANY_DOMAIN else f" of domain '{row.domain}'"
        hint = "ask for fewer" + (", or let patients be shared with --group image" if self.patients else "")
        return (
            f"{row.site}: {wanted} images{place} with label '{self.collection.classes[label]}' wanted{use}, {free} "
            f"left in {self.collection.name}: short by {wanted - free}; {hint}"
        )


def target_sizes(rows: Sequence[SiteRow], label: int) -> list[int]:
    """[train, validation, test] of one class at a site with these rows of one table.

    Beside test sizes that the table reports, validation is the tenth, rounded down, but at least 1 where the class has
    three images: the 884/146/440 of the paper's feature skew. Otherwise 60/10/30 by largest remainder.
    """
    count = sum(row.counts[label] for row in rows)
    test = sum(row.test[label] for row in rows if row.test)
    if any(row.test is None for row in rows):
        return split_sizes(count)
    validation = max(count // 10, 1 if count - test >= 2 else 0)
    return [count - test - validation, validation, test]


def _class_counts(collection: Collection, rows: np.ndarray) -> str:
    counts = Counter(int(collection.labels[row]) for row in rows)
    return ", ".join(f"{counts[label]} {name}" for label, name in enumerate(collection.classes))


def _drawing_order(count: int, patients: list[str] | None, rng: np.random.Generator) -> np.ndarray:
    """A random order of all images in which the images of one patient stand together."""
    order = rng.permutation(count)
    if patients is None:
        return order
    first: dict[str, int] = {}
    for position, row in enumerate(order):
        first.setdefault(patients[row], position)
    return np.array(sorted(order, key=lambda row: first[patients[row]]), dtype=np.int64)


def _no_domain(collection: Collection, domain: str) -> str:
    known = {name for name in collection.domains if name}
    if not known:
        return (
            f"{collection.name} has no domains, so none is '{domain}': give --domain-column, or take images of any "
            f"with --any-domain"
        )
    return f"{collection.name} has no domain '{domain}'; {nearest(domain, known)}"
