"""Importers of volumes, each on a tiny tree in the very layout of the published set."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest

from heterosync.cli import main
from heterosync.cli.volumes import VOLUME_KINDS
from heterosync.data.volume_check import inspect_volumes
from heterosync.data.volume_collection import deal
from heterosync.data.volume_importers import VOLUME_SOURCES, open_cases
from heterosync.data.volumes import open_volume
from heterosync.errors import ProblemList, UserError
from volume_toys import oblique, organ, save_metaimage, save_nifti, save_series, scan

LPS = oblique(axes="LPS")


def promise12(top: Path) -> list[np.ndarray]:
    for number in range(3):
        part = top / f"TrainingData_Part{1 + number // 2}"
        save_metaimage(part / f"Case{number:02}.mhd", scan(number), LPS)
        save_metaimage(part / f"Case{number:02}_segmentation.mhd", organ().astype(np.int8), LPS)
    save_metaimage(top / "TestData" / "Case03.mhd", scan(3), LPS)
    return [scan(number) for number in range(3)]


def decathlon(top: Path) -> list[np.ndarray]:
    pairs = []
    for number in (16, 4):
        label = organ()
        label[3:5] *= 2
        name = f"prostate_{number:02}.nii.gz"
        save_nifti(top / "imagesTr" / name, np.stack([scan(number), scan(99)], axis=-1).astype(np.float32), LPS)
        save_nifti(top / "labelsTr" / name, label, LPS)
        (top / "imagesTr" / f"._{name}").write_bytes(b"what macOS leaves in the archive")
        pairs.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    content = {"name": "PROSTATE", "modality": {"0": "T2", "1": "ADC"}, "labels": {"0": "background"}, "numTest": 16}
    (top / "dataset.json").write_text(
        json.dumps(content | {"training": pairs, "test": ["./imagesTs/prostate_03.nii.gz"]})
    )
    return [scan(4), scan(16)]


def prostate158(top: Path) -> list[np.ndarray]:
    for number in (20, 21):
        folder = top / "train" / f"{number:03}"
        label = organ().astype(np.uint16)
        label[6:] *= 2
        save_nifti(folder / "t2.nii.gz", scan(number).astype(np.float32), LPS)
        save_nifti(folder / "t2_anatomy_reader1.nii.gz", label, LPS)
        for other in ("adc", "dwi", "t2_tumor_reader1"):
            save_nifti(folder / f"{other}.nii.gz", scan(5), LPS)
    save_nifti(top / "test" / "099" / "t2.nii.gz", scan(9), LPS)
    return [scan(20), scan(21)]


def plain(top: Path) -> list[np.ndarray]:
    save_nifti(top / "images/a.nii.gz", scan(1), LPS)
    save_nifti(top / "masks/a.nii", organ(), LPS)
    save_series(top / "images/b", scan(2), LPS)
    save_metaimage(top / "masks/b.mhd", organ(), LPS)
    return [scan(1), scan(2)]


def prostatex(top: Path) -> list[np.ndarray]:
    """As the TCIA downloader writes it; masks as in the folder mask_prostate, beside which image_list.csv lies."""
    for number in range(3):
        name = f"ProstateX-{number:04}"
        study = top / "PROSTATEx" / name / "07-07-2011-NA-MR prostaat kanker detectie WDS mc MCAPRODETN-05711"
        for series, description in ((3, "t2_tse_sag"), (4, "t2_tse_tra"), (5, "t2_tse_tra"), (7, "ep2d_diff_tra_ADC")):
            save_series(
                study / f"{series}.000000-{description}-00702",
                scan(10 * number + series),
                oblique(axes="PSL") if "sag" in description else LPS,
                uid=f"1.2.{number}.{series}",
                SeriesDescription=description,
                SeriesNumber=series,
            )
        if number < 2:
            save_nifti(top / "masks/prostate/mask_prostate" / f"{name}.nii.gz", organ(), LPS)
    (top / "masks/prostate/image_list.csv").write_text("T2\nProstateX-0000_t2_tse_tra_4\n")
    return [scan(4), scan(15)]  # series 4 as listed; of the other patient the last one


LAYOUTS = {
    "promise12": (promise12, ["Case00", "Case01", "Case02"], "1 cases left out: they have no segmentation"),
    "msd-prostate": (decathlon, ["prostate_04", "prostate_16"], "16 cases left out: test images without labels"),
    "prostate158": (prostate158, ["train/020", "train/021"], "1 cases left out: they have no t2_anatomy_reader1"),
    "volumes": (plain, ["a", "b"], None),
    "prostatex": (prostatex, ["ProstateX-0000", "ProstateX-0001"], "1 cases left out: they have no mask"),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_each_set_in_its_own_layout(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, ids, note = LAYOUTS[kind]
    images = make(tmp_path / "set")
    command = ["data", "import-volumes", kind, str(tmp_path / "set"), "--out", str(tmp_path / "site"), "--test-only"]
    if kind == "prostatex":
        command[3] = str(tmp_path / "set" / "PROSTATEx")
        command += ["--masks", str(tmp_path / "set/masks/prostate/mask_prostate")]
    assert main(command) == 0
    assert (note or "written") in capsys.readouterr().out
    found = inspect_volumes(tmp_path / "site")
    assert found.problems == [] and found.places == [0] * len(ids)
    lines = (tmp_path / "site/manifest.csv").read_text().splitlines()
    assert lines[0] == "image,mask,patient,source,split" and [line.split(",")[3] for line in lines[1:]] == ids
    for row, values in zip(found.rows, images, strict=True):
        image, mask = (open_volume(tmp_path / "site" / name) for name in (row.image, row.mask))
        np.testing.assert_array_equal(image.read(), values)
        np.testing.assert_array_equal(mask.read(), organ())
        np.testing.assert_allclose(image.geometry.affine, LPS, atol=1e-4)


def test_the_help_names_every_kind() -> None:
    assert VOLUME_KINDS.split(", ") == list(VOLUME_SOURCES) and set(LAYOUTS) == set(VOLUME_SOURCES)


def test_patients_are_dealt_among_sites(tmp_path: Path) -> None:
    for number in range(7):
        save_nifti(tmp_path / f"set/images/{number}.nii.gz", scan(number), LPS)
        save_nifti(tmp_path / f"set/masks/{number}.nii.gz", organ(), LPS)
    found = open_cases(tmp_path / "set", "volumes")
    parts = deal(found, ["a", "b", "c"], 0)
    assert sorted(len(part.cases) for part in parts.values()) == [2, 2, 3]
    assert sorted(case.id for part in parts.values() for case in part.cases) == [str(number) for number in range(7)]
    again, other = (deal(found, ["a", "b", "c"], seed) for seed in (0, 1))
    assert again == parts != other
    with pytest.raises(UserError, match="7 patients cannot be dealt among 8 sites"):
        deal(found, list("abcdefgh"), 0)
    assert (
        main(["data", "import-volumes", "volumes", str(tmp_path / "set"), "--sites", "a,b", "--out", str(tmp_path)])
        == 0
    )
    assert len(inspect_volumes(tmp_path / "a").rows) == 4 and len(inspect_volumes(tmp_path / "b").rows) == 3


def test_bad_cases_are_told_together_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = tmp_path / "set"
    for number in range(4):
        save_nifti(top / f"images/{number}.nii.gz", scan(number), LPS)
        save_nifti(top / f"masks/{number}.nii.gz", organ(), LPS)
    save_nifti(top / "masks/0.nii.gz", organ() * 3, LPS)
    save_nifti(top / "masks/1.nii.gz", organ(), oblique())
    save_nifti(top / "masks/2.nii.gz", 0 * organ(), LPS)
    command = ["data", "import-volumes", "volumes", str(top), "--sites", "a,b", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    shown = capsys.readouterr().err
    assert "has the value 3 besides 0 and 1: set --foreground" in shown or "mm beside the image" in shown
    assert list((tmp_path / "out").iterdir()) == []
    (top / "masks/3.nii.gz").write_bytes(b"junk")
    with pytest.raises(ProblemList, match="masks/3.nii.gz: truncated"):
        open_cases(top, "volumes")
    (top / "masks/3.nii.gz").unlink()
    with pytest.raises(ProblemList, match="no mask of 3: add it or remove the image"):
        open_cases(top, "volumes")


def test_other_mask_values_are_named(tmp_path: Path) -> None:
    save_nifti(tmp_path / "images/a.nii.gz", scan(), LPS)
    save_nifti(tmp_path / "masks/a.nii.gz", organ() * 255, LPS)
    out = tmp_path / "site"
    command = ["data", "import-volumes", "volumes", str(tmp_path), "--foreground", "255", "--out", str(out)]
    assert main(command) == 0
    np.testing.assert_array_equal(np.asarray(nibabel.load(out / "masks/0001.nii.gz").dataobj), organ())


@pytest.mark.parametrize(
    ("kind", "masks", "words"),
    [
        ("promis12", None, "did you mean 'promise12'"),
        ("promise12", None, "holds no case as promise12 has them"),
        ("promise12", ".", "leave out --masks"),
        ("prostatex", None, "name their folder with --masks"),
        ("msd-prostate", None, "dataset.json is missing"),
        ("volumes", None, "put the volumes into images"),
    ],
)
def test_wrong_folders_are_told(tmp_path: Path, kind: str, masks: str | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_cases(tmp_path, kind, tmp_path if masks else None)


def test_a_series_that_does_not_fit_its_mask_is_told(tmp_path: Path) -> None:
    top = tmp_path / "set"
    prostatex(top)
    save_nifti(top / "masks/prostate/mask_prostate/ProstateX-0001.nii.gz", organ((14, 12, 7)), LPS)
    command = ["data", "import-volumes", "prostatex", str(top / "PROSTATEx"), "--out", str(tmp_path / "site")]
    assert main([*command, "--masks", str(top / "masks/prostate/mask_prostate")]) == 1
    assert not (tmp_path / "site").exists()
