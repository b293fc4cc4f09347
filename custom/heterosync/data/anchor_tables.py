"""Which anchor task each site gets, as tables: one for all sites, or the mix of different ones (paper, Ablation)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from heterosync.data.anchor import write_anchor
from heterosync.data.anchor_controls import controlled
from heterosync.data.collection import Collection
from heterosync.data.readers import to_size
from heterosync.data.scenario_plan import draw_counts
from heterosync.data.scenario_tables import ANY_DOMAIN, UNSEEN, SiteRow, scaled
from heterosync.data.sources import SOURCES, open_collection
from heterosync.data.synthetic import ANCHOR_CLASSES, CLASSES, SyntheticSpec, synthetic_collection
from heterosync.data.tables import read_csv
from heterosync.errors import ProblemList, UserError, nearest

TABLES = Path(__file__).parent / "anchors"
COLUMNS = ("site", "source", "negative_label", "positive_label", "negative", "positive")
SYNTHETIC = "synthetic"  # optional column


@dataclass(frozen=True)
class AnchorRow:
    """The anchor task of one site ("*": of every site without a row): source, its two labels, images of either.

    synthetic: the generator's domain that stands in where the images are synthetic; "" where there is none.
    """

    site: str
    source: str
    labels: tuple[str, str]
    counts: tuple[int, int]
    synthetic: str = ""


def anchor_table_names() -> list[str]:
    """Names of the anchor tables that come with heterosync."""
    return sorted(path.stem for path in TABLES.glob("*.csv"))


def read_anchor_table(table: Path | str) -> list[AnchorRow]:
    """Rows of a shipped table (by name) or of a CSV file. Raises `UserError`, or `ProblemList` with every bad line."""
    path = TABLES / f"{table}.csv" if str(table) in anchor_table_names() else Path(table)
    if not path.is_file():
        raise UserError(
            f"'{table}' is neither a CSV file nor an anchor table; {nearest(str(table), anchor_table_names())}"
        )
    found = read_csv(path, comments=True)
    if not set(COLUMNS) <= set(found.header) <= {*COLUMNS, SYNTHETIC}:
        raise UserError(f"{path}: the header must be {','.join(COLUMNS)}, but it is '{','.join(found.header)}'")
    rows, problems = [], []
    seen: set[str] = set()
    for (line, row), (_, values) in zip(found.records(), found.rows, strict=True):
        counts = row.get("negative", ""), row.get("positive", "")
        wrong = found.ragged(values)
        if not wrong and not all(count.isdecimal() and int(count) for count in counts):
            wrong = f"counts '{counts[0]}' and '{counts[1]}' must be whole numbers from 1"
        if not wrong and not all(row[column] for column in COLUMNS):
            wrong = "every column must be filled"
        if not wrong and row["site"] in seen:
            wrong = f"site '{row['site']}' stands there twice: delete one of the rows"
        if wrong:
            problems.append(f"{path} line {line}: {wrong}")
            continue
        seen.add(row["site"])
        labels = row["negative_label"], row["positive_label"]
        rows.append(
            AnchorRow(row["site"], row["source"], labels, (int(counts[0]), int(counts[1])), row.get(SYNTHETIC, ""))
        )
    if not rows and not problems:
        problems.append(f"{path} has no rows: write one line per site, or one for the site '*'")
    if problems:
        raise ProblemList(problems)
    return rows


def anchors_of_sites(table: Sequence[AnchorRow], sites: Sequence[str], scale: float = 1.0) -> dict[str, AnchorRow]:
    """The row of each site, counts times `scale` as in `scaled`. Raises `ProblemList` where a site has none."""
    by_site = {}
    for row in table:
        small = scaled([SiteRow(row.site, ANY_DOMAIN, *row.counts)], scale)[0]
        by_site[row.site] = AnchorRow(ANY_DOMAIN, row.source, row.labels, small.counts, row.synthetic)
    absent = [site for site in sites if site not in by_site and ANY_DOMAIN not in by_site]
    if absent:
        known = ", ".join(site for site in by_site if site != UNSEEN)
        raise ProblemList([f"site '{site}' has no row in the anchor table, which has {known}" for site in absent])
    return {site: by_site.get(site) or by_site[ANY_DOMAIN] for site in sites}


def sources_from(rows: Iterable[AnchorRow], paths: Mapping[str, Path]) -> Callable[[AnchorRow], Collection]:
    """Opens the sources of these rows, each by its own importer. Raises `UserError` for one without a path, or a path
    that no row needs."""
    needed = {row.source for row in rows}
    for name in paths:
        if name not in needed:
            raise UserError(f"--sat-source {name}=…: the anchor table has no such source; {nearest(name, needed)}")
    for name in sorted(needed - set(paths)):
        raise UserError(f"the anchor table takes images of '{name}': say where they are with --sat-source {name}=PATH")
    return lambda row: open_collection(
        paths[row.source], *row.labels, kind=row.source if row.source in SOURCES else None
    )


def synthetic_sources(rows: Iterable[AnchorRow], seed: int, spec: SyntheticSpec) -> Callable[[AnchorRow], Collection]:
    """Generated images that stand in for the sources of these rows. Raises `UserError` for a row without a domain."""
    needed: dict[str, tuple[int, int]] = {}
    for row in rows:
        if not row.synthetic:
            raise UserError(
                f"the anchor table names no synthetic images for '{row.source}': fill the column 'synthetic'"
            )
        had = needed.get(row.synthetic, (0, 0))
        needed[row.synthetic] = max(had[0], row.counts[0]), max(had[1], row.counts[1])

    def open_source(row: AnchorRow) -> Collection:
        classes = ANCHOR_CLASSES if row.synthetic.startswith("chest") else CLASSES
        table = [SiteRow("anchor", row.synthetic, *needed[row.synthetic])]
        return synthetic_collection(table, seed, spec, classes)

    return open_source


def write_anchors(
    rows: Mapping[str, AnchorRow],
    folder: Path,
    open_source: Callable[[AnchorRow], Collection],
    seed: int = 0,
    size: int | None = None,
    control: str | None = None,
) -> dict[str, Path]:
    """Write each different pack once, below `folder`; returns the pack of each site.

    open_source: the images of a row's source with its two labels. size: pixels of a side to which the images are
    brought (None: as they are; a thousand full radiographs are gigabytes). control: one of `CONTROLS`.
    Raises `UserError` when a source has too few images of a class.
    """
    packs: dict[AnchorRow, Path] = {}
    sources: dict[tuple, Collection] = {}
    for row in dict.fromkeys(rows.values()):
        key = row.source, row.labels, row.synthetic
        if key not in sources:
            sources[key] = open_source(row)
        drawn = draw_counts(sources[key], row.counts, seed)
        images = [drawn.image(i) for i in range(len(drawn))]
        if size is not None:
            images = [to_size(image, size, 1 if image.ndim == 2 else 3).transpose(1, 2, 0) for image in images]
        name = f"{drawn.name}: {drawn.classes[0]} or {drawn.classes[1]}"
        images, labels, name = controlled(images, drawn.labels, name, control, seed)
        packs[row] = folder / f"anchor-{len(packs)}"
        balanced = row.counts[0] == row.counts[1]
        write_anchor(packs[row], images, labels, name, *drawn.classes, balanced=balanced)
    return {site: packs[row] for site, row in rows.items()}
