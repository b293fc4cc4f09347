"""The one reader of tables: separators, byte order mark, line numbers, comments, and a clear line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from heterosync.data.tables import Table, read_csv
from heterosync.errors import UserError


def table_of(folder: Path, text: str, encoding: str = "utf-8", **options) -> Table:
    (folder / "t.csv").write_bytes(text.encode(encoding))
    return read_csv(folder / "t.csv", **options)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_way_to_save_a_table(tmp_path: Path, separator, encoding, end):
    lines = [f"name {separator} value", f" ä {separator}1", separator, "", f'"x{separator}{end}y"{separator}2', ""]
    table = table_of(tmp_path, end.join(lines), encoding)
    assert table.header == ["name", "value"]
    assert table.rows == [(2, ["ä", "1"]), (6, [f"x{separator}{end}y", "2"])], "a row of two lines ends in line 6"
    assert list(table.records())[0] == (2, {"name": "ä", "value": "1"})


def test_comments_keep_the_line_numbers(tmp_path: Path):
    text = "# made; by, hand\na;b\n  # more\n\n1;2\n"
    assert table_of(tmp_path, text, comments=True) == Table(["a", "b"], [(5, ["1", "2"])])
    assert table_of(tmp_path, "a,b\n#1,2\n").rows == [(2, ["#1", "2"])], "not in tables that have no comments"


def test_ragged_rows(tmp_path: Path):
    table = table_of(tmp_path, "a,b\n1\n1,2,3\n1,2\n")
    wrong = [table.ragged(values) for _, values in table.rows]
    assert wrong[2] is None and [text[:8] for text in wrong[:2]] == ["1 values", "3 values"]
    assert next(table.records()) == (2, {"a": "1"})


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        ("", "utf-8", "the file is empty"),
        ("\n , \n", "utf-8", "the file is empty"),
        ("a,b,a\n", "utf-8", "the column 'a' stands there twice"),
        ("ä,b\n", "latin-1", "not UTF-8 text: save it as CSV UTF-8"),
        ("a,b\n", "utf-16", "not UTF-8 text: save it as CSV UTF-8"),
        ('a,b\n"1,2\n', "utf-8", "not a CSV file"),
    ],
)
def test_what_is_no_table(tmp_path: Path, text: str, encoding: str, message: str):
    with pytest.raises(UserError, match=f"^mine.csv: {message}") as caught:
        table_of(tmp_path, text, encoding, name="mine.csv")
    assert "\n" not in str(caught.value)


def test_absent_and_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"t\.csv: the file is missing"):
        read_csv(tmp_path / "t.csv")
    with pytest.raises(UserError, match="a folder stands in its place"):
        read_csv(tmp_path)
