"""Scenario tables: who gets how many images of what. They are data (CSV files), never code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from heterosync.data.tables import read_csv
from heterosync.errors import ProblemList, UserError, nearest

TABLES = Path(__file__).parent / "scenarios"
REQUIRED = ("site", "negative", "positive")
OPTIONAL = ("domain", "level", "test_negative", "test_positive", "draw")
ANY_DOMAIN = "*"
UNSEEN = "unseen"
DRAWS = ("disjoint", "shared")
_SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class SiteRow:
    """`negative` and `positive` images of one domain ("*": of any) for one site; a site may have several rows.

    test: how many negative and positive ones are test images, where a reported size fixes that; None: 30 %.
    shared: the sites draw from one pool that was split before, so that two may hold the same image, in the same split.
    """

    site: str
    domain: str
    negative: int
    positive: int
    test: tuple[int, int] | None = None
    shared: bool = False

    @property
    def counts(self) -> tuple[int, int]:
        return self.negative, self.positive


def table_names() -> list[str]:
    """Names of the tables that come with heterosync."""
    return sorted(path.stem for path in TABLES.glob("*.csv"))


def table_levels(table: Path | str) -> list[str]:
    """The levels of a table in its own order; [] when it has none. Errors as `read_table`."""
    _, levels = _read(table)
    return list(dict.fromkeys(level for level, _ in levels if level))


def read_table(table: Path | str, level: str | None = None) -> list[SiteRow]:
    """Rows of a shipped table (by name) or of a CSV file: site,domain,negative,positive; lines with # are comments.

    An empty domain, or a table without that column, means any domain, as `*` does. Further columns: `level` (one table
    holds all levels of a skew, `level` picks one), `test_negative` and `test_positive` (exact sizes of the test split),
    `draw` (`disjoint`, the default, or `shared`: one pool for all sites, split first).
    Raises `UserError` for an absent or unknown level, `ProblemList` with every bad line.
    """
    path, found = _read(table)
    levels = list(dict.fromkeys(name for name, _ in found if name))
    known = f"{path.stem} has the levels {', '.join(levels)}"
    if level is not None and not levels:
        raise UserError(f"{path.stem} has no levels: leave out --level {level}")
    if level is None and levels:
        raise UserError(f"{known}: choose one with --level")
    if level is not None and level not in levels:
        raise UserError(f"{known}, not '{level}': choose one of them with --level")
    return [row for name, row in found if name == (level or "")]


def _read(table: Path | str) -> tuple[Path, list[tuple[str, SiteRow]]]:
    path = TABLES / f"{table}.csv" if str(table) in table_names() else Path(table)
    if not path.is_file():
        raise UserError(f"'{table}' is neither a CSV file nor a scenario table; {nearest(str(table), table_names())}")
    found = read_csv(path, comments=True)
    header = set(filter(None, found.header))
    if not set(REQUIRED) <= header <= {*REQUIRED, *OPTIONAL} or ("test_negative" in header) != (
        "test_positive" in header
    ):
        raise UserError(
            f"{path}: the header must be site,domain,negative,positive (domain may be left out; level, test_negative "
            f"with test_positive, and draw may be added), but it is '{','.join(found.header)}'"
        )
    rows, problems = [], []
    for (line, row), (_, values) in zip(found.records(), found.rows, strict=True):
        try:
            wrong = found.ragged(values)
            if not wrong and "level" in header and not row["level"]:
                wrong = "the column 'level' is empty: name the level of every row"
            if wrong:
                raise UserError(wrong)
            rows.append((row.get("level", ""), _row(row)))
        except UserError as error:
            problems.append(f"{path} line {line}: {error}")
    problems += _contradictions(path, rows)
    if not rows and not problems:
        problems.append(f"{path} has no rows: write one line per site")
    if problems:
        raise ProblemList(problems)
    return path, rows


def _contradictions(path: Path, rows: list[tuple[str, SiteRow]]) -> list[str]:
    problems = []
    pairs = Counter((level, row.site, row.domain) for level, row in rows)
    for (level, site, domain), count in pairs.items():
        at = f" at level {level}" if level else ""
        if count > 1:
            problems.append(f"{path}: site '{site}' has domain '{domain}' twice{at}: add them up")
    for level in dict.fromkeys(level for level, _ in rows):
        at = f" at level {level}" if level else ""
        group = [row for name, row in rows if name == level]
        if len({row.shared for row in group}) > 1:
            problems.append(f"{path}: some rows{at} are shared and some disjoint: write one for all")
        if any(row.shared and row.site == UNSEEN for row in group):
            problems.append(f"{path}: '{UNSEEN}' cannot share images with training sites{at}: remove its rows")
        for site in dict.fromkeys(row.site for row in group):
            if len({row.test is None for row in group if row.site == site}) > 1:
                problems.append(f"{path}: site '{site}'{at} has test sizes in some rows only: fill all or none")
    return problems


def scaled(table: Sequence[SiteRow], scale: float) -> list[SiteRow]:
    """The table with all counts times `scale`, but never below 3 (or the count): every split keeps both classes.

    The sizes of test splits hold for the full size alone; other sizes are split by the general rule.
    """
    if not 0 < scale < float("inf"):
        raise UserError(f"scale must be a number above 0, not {scale}")
    if scale == 1:
        return list(table)

    def times(count: int) -> int:
        return max(round(count * scale), min(count, 3))

    return [replace(row, negative=times(row.negative), positive=times(row.positive), test=None) for row in table]


def scaling_notes(table: Sequence[SiteRow], scale: float) -> list[str]:
    """One line for every row that the minimum of 3 holds above its share: there the table's ratio is not kept."""
    notes = []
    for old, new in zip(table, scaled(table, scale), strict=True):
        share = [round(count * scale) for count in old.counts]
        if scale != 1 and list(new.counts) != share:
            place = "" if old.domain == ANY_DOMAIN else f", {old.domain}"
            notes.append(
                f"{old.site}{place}: {new.negative}:{new.positive} in place of {share[0]}:{share[1]}, since no count "
                f"is scaled below 3; full size: {old.negative}:{old.positive}"
            )
    return notes


def on_any_domain(table: Sequence[SiteRow]) -> list[SiteRow]:
    """The same sites for a collection whose domains are unknown: rows of one site are added up."""
    totals: dict[str, SiteRow] = {}
    for row in table:
        row = replace(row, domain=ANY_DOMAIN)
        if row.site in totals:
            had = totals[row.site]
            test = (had.test[0] + row.test[0], had.test[1] + row.test[1]) if had.test and row.test else None
            row = replace(row, negative=had.negative + row.negative, positive=had.positive + row.positive, test=test)
        totals[row.site] = row
    return list(totals.values())


def _row(row: dict[str, str]) -> SiteRow:
    site, domain = row["site"], row.get("domain") or ANY_DOMAIN
    counts = row["negative"], row["positive"]
    if not _SITE_NAME.fullmatch(site):
        raise UserError(f"site name '{site}' must start with a letter or digit and hold only letters, digits, . _ -")
    if not all(count.isdecimal() for count in counts) or not any(int(count) for count in counts):
        raise UserError(f"counts '{counts[0]}' and '{counts[1]}' must be whole numbers from 0, not both 0")
    draw = row.get("draw") or DRAWS[0]
    if draw not in DRAWS:
        raise UserError(f"draw '{draw}' is unknown; {nearest(draw, DRAWS)}")
    negative, positive = map(int, counts)
    return SiteRow(site, domain, negative, positive, _test_sizes(row, (negative, positive)), draw == "shared")


def _test_sizes(row: dict[str, str], counts: tuple[int, int]) -> tuple[int, int] | None:
    given = [row.get(name, "") for name in ("test_negative", "test_positive")]
    if not any(given):
        return None
    if not all(text.isdecimal() for text in given):
        raise UserError(f"test sizes '{given[0]}' and '{given[1]}' must be whole numbers from 0, or both empty")
    sizes = int(given[0]), int(given[1])
    for size, count in zip(sizes, counts, strict=True):
        if size > count - min(count, 2):  # one for training, one for validation
            raise UserError(f"{size} test images of {count} leave none for training or validation: lower it")
    return sizes
