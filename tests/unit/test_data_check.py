"""`check_site`: all problems at once, in words that can be acted on. Single kinds of bad input: tests/bad_input."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_toys import picture, png_site, save_png, write_manifest
from heterosync.data.anchor import write_anchor
from heterosync.data.check import check_site, summarised
from heterosync.data.dataset import load_site
from toys import toy_site


def test_good_folder(tmp_path: Path):
    folder = toy_site(tmp_path / "site")
    assert check_site(folder) == [] == check_site(folder, 16, 3)
    assert not (folder / "splits.csv").exists(), "a check changes nothing"


def test_all_problems_at_once_in_the_order_of_rows(tmp_path: Path):
    rows = png_site(tmp_path, (8, 8))
    (tmp_path / rows[1][0]).write_bytes(b"")
    (tmp_path / rows[3][0]).unlink()
    rows[5][1] = "sick"
    rows.append(rows[7])
    np.save(tmp_path / "nan.npy", np.full((4, 4), np.nan))
    rows.append(["nan.npy", "normal"])
    write_manifest(tmp_path, rows)
    problems = check_site(tmp_path)
    parts = [
        "row 7: label 'sick'",
        "row 3: images/01.png: the file is empty",
        "row 5: images/03.png: the file does not exist",
        "row 18: images/07.png stands in row 9",
        "row 19: nan.npy: the picture has NaN",
        "anchor: the folder is missing",
    ]
    assert len(problems) == len(parts)
    assert all(part in problem for part, problem in zip(parts, problems, strict=True)), problems


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("task: t\nlabels: [normal, abnormal]\ndevise: cpu\nthreads: 0\n", ["unknown key 'devise'", "threads = '0'"]),
        ("task: t\nlabels: [normal]\n", ["labels = ['normal']"]),
        (None, ["site.yaml: the file is missing"]),
    ],
)
def test_a_bad_config_hides_no_bad_row(tmp_path: Path, config: str | None, expected: list[str]):
    rows = png_site(tmp_path)
    (tmp_path / rows[1][0]).unlink()
    if config is None:
        (tmp_path / "site.yaml").unlink()
    else:
        (tmp_path / "site.yaml").write_text(config)
    problems = check_site(tmp_path)
    parts = [*expected, "row 3: images/01.png: the file does not exist", "anchor: the folder is missing"]
    assert len(problems) == len(parts), problems
    assert all(part in problem for part, problem in zip(parts, problems, strict=True)), problems


def test_labels_are_compared_although_another_key_is_wrong(tmp_path: Path):
    rows = png_site(tmp_path)
    rows[0][1] = "sick"
    write_manifest(tmp_path, rows)
    with open(tmp_path / "site.yaml", "a") as file:
        file.write("colour: red\n")
    assert [problem.split(":")[0] for problem in check_site(tmp_path, need_anchor=False)] == [
        "site.yaml",
        "manifest.csv row 2",
    ]


def test_many_problems_of_one_kind_are_summarised(tmp_path: Path):
    rows = png_site(tmp_path, (12, 12))
    for name, _ in rows[2:9] + rows[15:17]:
        (tmp_path / name).unlink()
    rows[20][1], rows[21][1] = "sick", "ill"
    write_manifest(tmp_path, rows)
    problems = check_site(tmp_path, need_anchor=False)
    lines = summarised(problems)
    assert len(problems) == 11 and [line for line in problems if line in lines] == [*problems[:7]]
    assert lines[7] == "… and 4 more of this kind, rows 9 to 10, 17 to 18" and len(lines) == 8
    assert summarised(problems, 9) == problems and summarised([]) == []


def test_lines_are_single_and_name_no_outside_path(tmp_path: Path):
    rows = png_site(tmp_path / "site", (8, 8))
    for i, data in enumerate((b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"junk" * 50)):
        (tmp_path / "site" / rows[i][0]).write_bytes(data)
    problems = check_site(tmp_path / "site", 16)
    assert len(problems) == 5
    assert all("\n" not in problem and str(tmp_path) not in problem for problem in problems), problems


def test_picture_with_two_labels_and_in_two_splits(tmp_path: Path):
    rows = [[*row, "train"] for row in png_site(tmp_path)]
    for i, split in ((0, "validation"), (1, "test"), (6, "validation"), (7, "test")):
        rows[i][2] = split
    save_png(tmp_path / rows[9][0], picture(2, (12, 12)))  # the picture of row 4, which is normal
    save_png(tmp_path / rows[3][0], picture(1, (12, 12)))  # the picture of row 3, which is in test
    write_manifest(tmp_path, rows, ("image", "label", "split"))
    assert check_site(tmp_path, need_anchor=False) == [
        "manifest.csv row 5: images/03.png is the same picture as row 3 in split test: "
        "delete one row, or correct the split",
        "manifest.csv row 11: images/09.png is the same picture as row 4 with the other label: "
        "correct one of the labels",
    ]


def test_copies_are_fine_where_heterosync_draws_the_splits(tmp_path: Path):
    rows = png_site(tmp_path, (10, 10))
    shutil.copy(tmp_path / rows[0][0], tmp_path / rows[1][0])
    assert check_site(tmp_path, need_anchor=False) == []
    splits = load_site(tmp_path, 12, need_anchor=False).splits
    assert any({0, 1} <= set(rows.tolist()) for rows in splits.values())


def test_patient_in_two_splits(tmp_path: Path):
    rows = [[*row, f"p{i}", ("train", "validation", "test")[i % 3]] for i, row in enumerate(png_site(tmp_path))]
    rows[4][2] = "p0"
    write_manifest(tmp_path, rows, ("image", "label", "patient", "split"))
    assert check_site(tmp_path, need_anchor=False) == [
        "manifest.csv row 6: patient p0 is in split validation but in row 2 in split train: correct the split"
    ]


def test_patient_column_that_came_after_the_draw(tmp_path: Path):
    rows = png_site(tmp_path, (10, 10))
    load_site(tmp_path, 12, need_anchor=False)
    write_manifest(tmp_path, [[*row, "p"] for row in rows], ("image", "label", "patient"))
    problems = check_site(tmp_path, need_anchor=False)
    assert problems and all(problem.endswith("delete splits.csv to draw the splits again") for problem in problems)


def test_anchor_must_be_disjoint_from_the_primary_task(tmp_path: Path):
    png_site(tmp_path)
    write_anchor(tmp_path / "anchor", [picture(3, (12, 12)), picture(77, (12, 12))], [0, 1], "toy", "off", "on")
    assert check_site(tmp_path) == [
        "manifest.csv row 5: images/03.png is also in the anchor pack, which must be disjoint: delete the row"
    ]


def test_anchor_that_is_not_needed_is_not_read(tmp_path: Path):
    png_site(tmp_path)
    (tmp_path / "anchor").mkdir()
    assert len(check_site(tmp_path)) == 1 and check_site(tmp_path, need_anchor=False) == []


@pytest.mark.parametrize("counts", [(2, 9), (9, 2), (1, 9)])
def test_class_too_small_for_three_splits(tmp_path: Path, counts):
    png_site(tmp_path, counts)
    problems = check_site(tmp_path, need_anchor=False)
    assert problems and all("add images of it, at least three in all" in problem for problem in problems)
