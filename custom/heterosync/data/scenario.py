"""Divide a collection among sites by a table of counts, and write the site folders."""

from __future__ import annotations

import csv
import io
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml

from heterosync.data.anchor import inspect_anchor
from heterosync.data.collection import Collection
from heterosync.data.tables import read_csv
from heterosync.errors import ProblemList, UserError, nearest
from heterosync.files import new_folder

TABLES = Path(__file__).parent / "scenarios"
COLUMNS = ("site", "domain", "negative", "positive")
ANY_DOMAIN = "*"
UNSEEN = "unseen"
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SiteRow:
    """`negative` and `positive` images of one domain ("*": of any) for one site; a site may have several rows."""

    site: str
    domain: str
    negative: int
    positive: int


@dataclass(frozen=True)
class ScenarioPlan:
    """Which images (rows of the collection) each site gets; `unseen` is one of the names where images remain."""

    rows: dict[str, np.ndarray]
    left_out: int

    def describe(self, collection: Collection) -> list[str]:
        """One line per site and domain: name, domain, counts per class."""
        negative, positive = collection.classes
        lines = []
        for site, rows in self.rows.items():
            counts = Counter((collection.domains[row], int(collection.labels[row])) for row in rows)
            role = " (test only)" if site == UNSEEN else ""
            for domain in sorted({domain for domain, _ in counts}):
                place = f", {domain}" if domain else ""
                lines.append(f"{site}{role}{place}: {counts[domain, 0]} {negative}, {counts[domain, 1]} {positive}")
        if self.left_out:
            lines.append(f"in no site: {self.left_out} images")
        return lines


def table_names() -> list[str]:
    """Names of the tables that come with heterosync."""
    return sorted(path.stem for path in TABLES.glob("*.csv"))


def read_table(table: Path | str) -> list[SiteRow]:
    """Rows of a shipped table (by name) or of a CSV file: site,domain,negative,positive; lines with # are comments.

    An empty domain, or a table without that column, means any domain, as `*` does.
    Raises `ProblemList` with every bad line.
    """
    path = TABLES / f"{table}.csv" if str(table) in table_names() else Path(table)
    if not path.is_file():
        raise UserError(f"'{table}' is neither a CSV file nor a scenario table; {nearest(str(table), table_names())}")
    found = read_csv(path, comments=True)
    header = set(filter(None, found.header))
    if header | {"domain"} != set(COLUMNS):
        had = ",".join(found.header)
        raise UserError(f"{path}: the header must be {','.join(COLUMNS)} (domain may be left out), but it is '{had}'")
    rows, problems = [], []
    for (line, row), (_, values) in zip(found.records(), found.rows, strict=True):
        try:
            wrong = found.ragged(values)
            if wrong:
                raise UserError(wrong)
            rows.append(_row(row))
        except UserError as error:
            problems.append(f"{path} line {line}: {error}")
    pairs = Counter((row.site, row.domain) for row in rows)
    repeated = [pair for pair, count in pairs.items() if count > 1]
    problems += [f"{path}: site '{site}' has domain '{domain}' twice: add them up" for site, domain in repeated]
    if not rows and not problems:
        problems.append(f"{path} has no rows: write one line per site")
    if problems:
        raise ProblemList(problems)
    return rows


def scaled(table: Sequence[SiteRow], scale: float) -> list[SiteRow]:
    """The table with all counts times `scale`, but never below 3 (or the count): every split keeps both classes."""
    if not 0 < scale < float("inf"):
        raise UserError(f"scale must be a number above 0, not {scale}")

    def times(count: int) -> int:
        return max(round(count * scale), min(count, 3))

    return [replace(row, negative=times(row.negative), positive=times(row.positive)) for row in table]


def plan_scenario(
    collection: Collection, table: Sequence[SiteRow], seed: int = 0, group: str = "patient", unseen: bool = True
) -> ScenarioPlan:
    """Draw the images of every site: without replacement, exact counts, the same for the same seed.

    group: "patient" lets no patient be in two sites (where patients are known); "image" ignores patients, as the
    HeteroSync paper does.
    unseen: the images that no site got become the test-only site `unseen`, if they hold both classes and the table has
    no rows for it.
    Raises `ProblemList` naming site, domain, class and how many images are missing.
    """
    if group not in ("patient", "image"):
        raise UserError(f"group must be 'patient' or 'image', not '{group}'")
    patients = collection.patients if group == "patient" else None
    order = _drawing_order(len(collection), patients, seed)
    domains = np.array([domain.casefold() for domain in collection.domains])[order]
    labels = collection.labels[order]
    free = np.ones(len(order), dtype=bool)
    owner: dict[str, str] = {}
    drawn: dict[str, list[int]] = {}
    problems = []
    for row in table:
        place = np.ones(len(order), dtype=bool) if row.domain == ANY_DOMAIN else domains == row.domain.casefold()
        if not place.any():
            problems.append(f"{row.site}: {_no_domain(collection, row.domain)}")
            continue
        for label, wanted in enumerate((row.negative, row.positive)):
            candidates = order[place & free & (labels == label)]
            if patients is not None:
                candidates = [i for i in candidates if owner.get(patients[i], row.site) == row.site]
                candidates.sort(key=lambda i: patients[i] not in owner)  # stable: patients of this site come first
            if wanted > len(candidates):
                problems.append(_shortage(collection, row, label, wanted, len(candidates), patients is not None))
            taken = [int(i) for i in candidates[:wanted]]
            free &= ~np.isin(order, taken)
            if patients is not None:
                owner.update({patients[i]: row.site for i in taken})
            drawn.setdefault(row.site, []).extend(taken)
    if problems:
        raise ProblemList(problems)
    rows = {site: np.array(sorted(taken), dtype=np.int64) for site, taken in drawn.items() if taken}
    rest = np.sort(order[free])
    if unseen and UNSEEN not in rows:
        kept = rest if patients is None else np.array([i for i in rest if patients[i] not in owner], dtype=np.int64)
        if len(set(collection.labels[kept])) == 2:  # one class alone tests nothing
            rows[UNSEEN] = kept
            return ScenarioPlan(rows, len(rest) - len(kept))
    return ScenarioPlan(rows, len(rest))


def draw_balanced(collection: Collection, per_class: int, seed: int = 0) -> Collection:
    """`per_class` images of each class, for an anchor pack. Raises `UserError` when a class has fewer."""
    plan = plan_scenario(collection, [SiteRow("anchor", ANY_DOMAIN, per_class, per_class)], seed, "image", unseen=False)
    return collection.subset(plan.rows["anchor"])


def write_scenario(
    collection: Collection,
    table: Sequence[SiteRow],
    out: Path | str,
    anchor: Path | str | None = None,
    seed: int = 0,
    unseen: bool = True,
    group: str = "patient",
    task: str | None = None,
) -> list[Path]:
    """Write `<out>/<site>/` for every site of the table (and `unseen`), each with a copy of the anchor pack.

    All of `out` appears in one step or not at all. Returns the site folders. Errors as `plan_scenario`; `UserError`
    when `out` is in use; as `check_anchor`.
    """
    plan = plan_scenario(collection, table, seed, group, unseen)
    out = Path(out)
    if anchor is not None:
        check_anchor(anchor, collection)
    with new_folder(out) as folder:
        for site, rows in plan.rows.items():
            write_site(folder / site, collection.subset(rows), task=task, anchor=anchor, test_only=site == UNSEEN)
    return [out / site for site in plan.rows]


def check_anchor(anchor: Path | str, collection: Collection) -> None:
    """Raise `ProblemList` when the anchor pack is unusable or shares images with the collection (methods: disjoint)."""
    pack, problems = inspect_anchor(Path(anchor), None)
    shared = set(pack.content) & set(collection.digests or ()) if pack else set()
    if shared:
        problems = [
            f"{len(shared)} images of the anchor pack are in {collection.name} too: make an anchor of other images"
        ]
    if problems:
        raise ProblemList([f"{anchor}: {problem}" for problem in problems])


def write_site(
    folder: Path,
    collection: Collection,
    task: str | None = None,
    anchor: Path | str | None = None,
    test_only: bool = False,
) -> Path:
    """Fill `folder` with site.yaml, manifest.csv, the images and, where given, a copy of the anchor pack.

    Arrays become one `images.npz`; files are copied under numbered names, since two folders may hold the same
    name; the manifest's column `source` tells where each came from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: dict = {"task": task or collection.name, "labels": list(collection.classes)}
    (folder / "site.yaml").write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    columns: dict[str, list[str]] = {"image": _store_images(folder, collection)}
    columns["label"] = [collection.classes[label] for label in collection.labels]
    if collection.patients is not None:
        columns["patient"] = collection.patients
    if test_only:
        columns["split"] = ["test"] * len(collection)
    if any(collection.domains):
        columns["domain"] = collection.domains
    columns["source"] = collection.ids
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    (folder / "manifest.csv").write_text(text.getvalue(), encoding="utf-8")
    if anchor is not None:
        shutil.copytree(anchor, folder / "anchor")
    return folder


def _store_images(folder: Path, collection: Collection) -> list[str]:
    if collection.pixels is not None:
        np.savez(folder / "images.npz", images=collection.pixels, labels=collection.labels)
        return [f"images.npz#{row}" for row in range(len(collection))]
    assert collection.paths is not None
    (folder / "images").mkdir()
    names = []
    for row, path in enumerate(collection.paths):
        suffix = ".nii.gz" if path.name.lower().endswith(".nii.gz") else path.suffix.lower()
        names.append(f"images/{row:06d}{suffix}")
        shutil.copyfile(path, folder / names[-1])
    return names


def _row(row: dict[str, str]) -> SiteRow:
    site, domain = row["site"], row.get("domain") or ANY_DOMAIN
    counts = row["negative"], row["positive"]
    if not _SITE_NAME.fullmatch(site):
        raise UserError(f"site name '{site}' must start with a letter or digit and hold only letters, digits, . _ -")
    if not all(count.isdecimal() for count in counts) or not any(int(count) for count in counts):
        raise UserError(f"counts '{counts[0]}' and '{counts[1]}' must be whole numbers from 0, not both 0")
    return SiteRow(site, domain, int(counts[0]), int(counts[1]))


def _drawing_order(count: int, patients: list[str] | None, seed: int) -> np.ndarray:
    """A random order of all images in which the images of one patient stand together."""
    order = np.random.default_rng(seed).permutation(count)
    if patients is None:
        return order
    first: dict[str, int] = {}
    for position, row in enumerate(order):
        first.setdefault(patients[row], position)
    return np.array(sorted(order, key=lambda row: first[patients[row]]), dtype=np.int64)


def _no_domain(collection: Collection, domain: str) -> str:
    known = {name for name in collection.domains if name}
    if not known:
        return f"{collection.name} has no domains, so none is '{domain}': give --domain-column, or leave it empty"
    return f"{collection.name} has no domain '{domain}'; {nearest(domain, known)}"


def _shortage(collection: Collection, row: SiteRow, label: int, wanted: int, free: int, grouped: bool) -> str:
    place = "" if row.domain == ANY_DOMAIN else f" of domain '{row.domain}'"
    hint = "ask for fewer" + (", or let patients be shared with --group image" if grouped else "")
    return (
        f"{row.site}: {wanted} images{place} with label '{collection.classes[label]}' wanted, {free} left "
        f"in {collection.name}: short by {wanted - free}; {hint}"
    )
