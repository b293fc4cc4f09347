"""The check of a folder of volumes: all problems at once, one line each with the row and the remedy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from heterosync.cli import main
from heterosync.data import volume_facts
from heterosync.data.check import check_site
from heterosync.data.task_kinds import check_folder
from heterosync.data.volume_check import inspect_volumes
from volume_toys import (
    CONFIG,
    SHAPE,
    header_alone,
    oblique,
    organ,
    save_nifti,
    save_series,
    scan,
    volume_site,
    write_rows,
)


def problems(folder: Path) -> list[str]:
    return inspect_volumes(folder).problems


def test_a_folder_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    volume_site(tmp_path, 10)
    assert main(["data", "check", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "2 test, 2 fold 1, 2 fold 2, 2 fold 3, 1 fold 4, 1 fold 5" in shown and "1.4 x 1.4 x 3 mm (10)" in shown
    assert main(["data", "check", "--json", str(tmp_path)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["problems"] == [] and summary["orientations"] == {"RAS": 10}
    assert summary["organ_ml"][0] == round(6 * 4 * 2 * 1.4 * 1.4 * 3 / 1000, 3)
    assert not (tmp_path / "folds.csv").exists(), "a check draws nothing for good"


def spoil(folder: Path, rows: list[list[str]]) -> dict[int, str]:
    """Spoil a case per row of the manifest; returns what must be said by row."""
    two = organ()
    two[0, 0, 0] = 2
    moved = oblique()
    moved[2, 3] += 4
    save_nifti(folder / rows[0][1], organ((14, 12, 7)))
    save_nifti(folder / rows[1][1], organ(), moved)
    save_nifti(folder / rows[2][1], 0 * organ())
    save_nifti(folder / rows[3][1], two)
    save_nifti(folder / rows[4][1], 0 * organ() + 1)
    save_nifti(folder / rows[5][0], scan()[:, :, 0], np.eye(4))
    save_nifti(folder / rows[6][0], np.stack([scan()] * 2, -1), oblique())
    save_nifti(folder / rows[7][0], 0 * scan() + 7)
    save_nifti(folder / rows[8][0], scan(), oblique((0.9, 0.9, 25)))
    (folder / rows[9][0]).unlink()
    (folder / rows[10][1]).write_bytes(b"junk")
    for name, values in zip(rows[11], (scan(11), organ()), strict=True):
        save_nifti(folder / name, values, oblique(axes="PSL"))
    rows[12][0] = "images/series"
    (save_series(folder / "images/series", scan(12), oblique(axes="LPS")) / "003.dcm").unlink()
    rows[13][0] = "../13.nii.gz"
    rows[14][1] = rows[16][1]
    shutil.copy(folder / rows[17][0], folder / rows[18][0])
    save_nifti(folder / rows[18][1], np.roll(organ(), 1, 0))
    write_rows(folder, rows)
    return {
        2: "masks/0.nii.gz: the mask has 14 x 12 x 7 voxels, the image 14 x 12 x 6",
        3: "masks/1.nii.gz: the mask lies up to 4 mm beside the image",
        4: "masks/2.nii.gz: the mask is empty: draw the organ",
        5: "masks/3.nii.gz: the mask has values 2 besides 0 and 1",
        6: "masks/4.nii.gz: the mask marks every voxel",
        7: "images/5.nii.gz: a 2-D image",
        8: "images/6.nii.gz: a 4-D image",
        9: "images/7.nii.gz: every voxel is 7, the image is constant",
        10: "images/8.nii.gz: a spacing of 0.9 x 0.9 x 25 mm is not that of a scan",
        11: "images/9.nii.gz: does not exist",
        12: "masks/10.nii.gz: truncated or damaged",
        13: "images/11.nii.gz: sagittal slices, most other cases have axial ones: take its axial series",
        14: "images/series: a slice is missing between 004.dcm and 002.dcm",
        15: "'../13.nii.gz' leads out of the site folder",
        18: "masks/16.nii.gz stands in row 16 already",
        20: "images/18.nii.gz is the same image as row 19 with another mask",
    }


def test_every_bad_input_at_once(tmp_path: Path) -> None:
    rows = volume_site(tmp_path, 20)
    expected = spoil(tmp_path, rows)
    found = problems(tmp_path)
    by_row = {int(line.split()[2].rstrip(":")): line for line in found}
    assert len(found) == len(by_row) and by_row.keys() == expected.keys(), found
    for row, words in expected.items():
        assert words in by_row[row] and "\n" not in by_row[row] and str(tmp_path) not in by_row[row], by_row[row]


def test_sizes_are_told_before_anything_is_allocated(tmp_path: Path) -> None:
    rows = volume_site(tmp_path)
    for row, shape, spacing in ((0, (4000, 4000, 400), 0.5), (1, (300, 300, 300), 10)):
        rows[row][0] = f"images/{row}.nii"
        header_alone(tmp_path / rows[row][0], shape, spacing)
    write_rows(tmp_path, rows)
    assert problems(tmp_path) == [
        "manifest.csv row 2: images/0.nii: 4000 x 4000 x 400 voxels as scanned, 23.8 GiB (at most 0.25): "
        "crop it, or correct its spacing of 0.5 x 0.5 x 0.5 mm",
        "manifest.csv row 3: images/1.nii: 2991 x 2991 x 2991 voxels at 1 mm, 99.7 GiB (at most 0.25): "
        "crop it, or correct its spacing of 10 x 10 x 10 mm",
    ]


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("task: segmentation\nfolds: 1\n", "site.yaml: folds = '1': expected a whole number of at least 2"),
        ("task: segmentation\nforeground: [0, 1]\n", "above 0 that are the organ"),
        ("task: segmentation\nlabels: [a, b]\n", "site.yaml: unknown key 'labels'"),
        ("task: segmentation\nmask_column: gland\n", "the column 'gland' is missing"),
        ("task: segmentation\nmask_column: image\n", "two of the column keys name the same column"),
    ],
)
def test_keys_of_site_yaml(tmp_path: Path, config: str, line: str) -> None:
    volume_site(tmp_path, 7, config)
    found = problems(tmp_path)
    assert len(found) == 1 and line in found[0]


def test_foreground_values_are_one_organ(tmp_path: Path) -> None:
    volume_site(tmp_path, 7, CONFIG + "foreground: [1, 2]\n")
    save_nifti(tmp_path / "masks/0.nii.gz", organ() * 2)
    assert problems(tmp_path) == []


@pytest.mark.parametrize(
    ("header", "cells", "lines"),
    [
        (["fold"], ["1", "2", "3", "4", "5", "", "1"], []),
        (["fold"], ["1", "2", "3", "3", "5", "", "1"], ["manifest.csv: fold 4 has no case: give it one"]),
        (
            ["fold"],
            ["1", "2", "3", "4", "6", "", "x"],
            ["row 6: fold '6': write a number of 1 to 5", "row 8: fold 'x'"],
        ),
        (["cv_fold"], ["1"] * 7, ["is the column 'cv_fold' the fold?"]),
        (["split"], ["test"] * 7, []),
        (["split"], ["train"] * 7, []),
        (
            ["split"],
            ["train"] * 6 + ["validation"],
            ["row 8: unknown split 'validation': give validation cases a fold"],
        ),
        (["split"], ["train"] * 4 + ["test"] * 3, ["fold 5 has no case: add cases of other patients, or set folds: 4"]),
        (["split", "fold"], ["train,1"] * 6 + ["test,2"], ["row 8: a test case with fold 2"]),
        (["split", "fold"], ["train,1"] * 6 + ["train,"], ["row 8: a training case without a fold"]),
        (
            ["patient", "fold"],
            ["a,1", "b,2", "c,3", "d,4", "e,5", "a,", "f,1"],
            ["row 7: patient a is in the test set"],
        ),
        (["patient"], ["a", "b", "c", "d", "e", "f", ""], ["row 8: column 'patient' is empty here"]),
    ],
)
def test_splits_and_folds_of_the_manifest(
    tmp_path: Path, header: list[str], cells: list[str], lines: list[str]
) -> None:
    rows = volume_site(tmp_path)
    write_rows(tmp_path, [[*row, cell] for row, cell in zip(rows, cells, strict=True)], ["image", "mask", *header])
    found = problems(tmp_path)
    assert len(found) == len(lines) and all(a in b for a, b in zip(lines, found, strict=True)), found


def test_same_image_twice(tmp_path: Path) -> None:
    rows = volume_site(tmp_path)
    shutil.copy(tmp_path / rows[0][0], tmp_path / rows[3][0])
    assert problems(tmp_path) == [], "drawn into one fold"
    places = inspect_volumes(tmp_path).places
    assert places[0] == places[3]
    write_rows(tmp_path, [[*row, str(1 + i % 5)] for i, row in enumerate(rows)], ["image", "mask", "fold"])
    assert problems(tmp_path)[0] == (
        "manifest.csv row 5: images/3.nii.gz is the same image as row 2, which is in fold 1: delete one of the rows"
    )
    save_nifti(tmp_path / rows[3][1], np.roll(organ(), 1, 0))
    assert "same image as row 2 with another mask" in problems(tmp_path)[0]


def test_a_mask_in_another_array_order_is_the_same_grid(tmp_path: Path) -> None:
    volume_site(tmp_path)
    order = nibabel.orientations.axcodes2ornt("LSA")
    save_nifti(
        tmp_path / "masks/2.nii.gz",
        np.ascontiguousarray(nibabel.apply_orientation(organ(), order)),
        oblique() @ nibabel.orientations.inv_ornt_aff(order, SHAPE),
    )
    assert problems(tmp_path) == []


def test_unchanged_cases_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume_site(tmp_path)
    first = inspect_volumes(tmp_path)
    read: list[str] = []
    real = volume_facts.read_case
    monkeypatch.setattr(volume_facts, "read_case", lambda *given: (read.append(given[1]), real(*given))[1])
    again = inspect_volumes(tmp_path)
    assert not read and again == first
    save_nifti(tmp_path / "masks/3.nii.gz", 0 * organ())
    assert "the mask is empty" in problems(tmp_path)[0] and read == ["images/3.nii.gz"]
    assert problems(tmp_path) and read == ["images/3.nii.gz"] * 2, "a problem is never taken from the index"


def test_each_kind_of_task_refuses_the_folder_of_the_other(tmp_path: Path) -> None:
    volume_site(tmp_path / "volumes")
    [line] = check_site(tmp_path / "volumes")
    assert line.startswith("site.yaml: task: segmentation: this method needs images with labels")
    volume_site(tmp_path / "words", 7, "task: fracture or not\nlabels: [a, b]\n")
    assert "write task: segmentation" in problems(tmp_path / "words")[0]
    assert "label" in check_folder(tmp_path / "words").problems[0]
