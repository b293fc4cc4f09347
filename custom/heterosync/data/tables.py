"""One reader for every table that people write: manifests, collections, anchor packs, scenarios."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from heterosync.errors import UserError


@dataclass(frozen=True)
class Table:
    """The header and the rows that are not blank, cells without the spaces around them; a row's line number counts the
    first line of the file as 1, as a spreadsheet shows it."""

    header: list[str]
    rows: list[tuple[int, list[str]]]

    def ragged(self, values: list[str]) -> str | None:
        """What is wrong with a row that has more or fewer values than the header has columns."""
        if len(values) == len(self.header):
            return None
        remedy = "fill in what is missing" if len(values) < len(self.header) else "quote values that hold the separator"
        return f"{len(values)} values for {len(self.header)} columns: {remedy}"

    def records(self) -> Iterator[tuple[int, dict[str, str]]]:
        """(line number, value by column); a ragged row lacks its last columns or loses its last values."""
        for line, values in self.rows:
            yield line, dict(zip(self.header, values, strict=False))


def read_csv(path: Path, name: str | None = None, comments: bool = False) -> Table:
    """Read a UTF-8 table, with or without a byte order mark, separated by what its header has most of: , ; or tab.

    `name` stands for the file in messages (None: its path); with `comments`, lines that start with # are left out.
    Raises `UserError` when the file is absent, is no such table, is empty or has two columns of one name.
    """
    name = name or str(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            lines = list(io.StringIO(file.read(), newline=""))
        if comments:  # blank, not gone: the line numbers stay
            lines = ["\n" if line.lstrip().startswith("#") else line for line in lines]
        first = next((line for line in lines if line.strip()), "")
        reader = csv.reader(lines, delimiter=max(",;\t", key=first.count), strict=True)
        rows = [(reader.line_num, [value.strip() for value in values]) for values in reader]
    except FileNotFoundError:
        raise UserError(f"{name}: the file is missing: write it, with a header and one row per image") from None
    except IsADirectoryError:
        raise UserError(f"{name}: a folder stands in its place: remove it and write the file") from None
    except UnicodeDecodeError:
        raise UserError(f"{name}: not UTF-8 text: save it as CSV UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{name}: not a CSV file ({error}): save it again as CSV UTF-8") from error
    except OSError as error:
        raise UserError(f"{name}: not readable ({type(error).__name__}): change its owner or mode") from error
    rows = [(line, values) for line, values in rows if any(values)]
    if not rows:
        raise UserError(f"{name}: the file is empty: write a header line and the rows below it")
    header = rows[0][1]
    twice = sorted({column for column in header if column and header.count(column) > 1})
    if twice:
        raise UserError(f"{name}: the column '{twice[0]}' stands there twice: delete or rename one")
    return Table(header, rows[1:])
