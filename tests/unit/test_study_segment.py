"""Masks of scans that the model has never seen: on the voxels of each scan, whole or not at all."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from heterosync.cli import main
from heterosync.data.scans import open_scans
from heterosync.data.volumes import open_volume
from heterosync.errors import UserError
from heterosync.federation.modelfile import load_model
from heterosync.study.segment import open_segmenter, predict_volumes
from heterosync.training import SEGMENTATION
from heterosync.training.dice import dice_coefficient
from heterosync.training.segmentation import VolumeExamples
from segment_toys import toy_segmenter, toy_volume_site
from study_toys import toy_model
from volume_toys import header_alone, oblique, save_nifti, save_series, scan, volume_site

LPS = oblique(axes="LPS")
GRIDS = [
    ("LPS", (1.1, 1.3, 3.0), (14, -9, 25)),
    ("RAS", (2.0, 2.0, 2.0), (0, 0, 0)),
    ("PSR", (0.9, 3.0, 1.2), (-20, 12, 5)),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_segmenter(tmp_path_factory.mktemp("model") / "best_model.pt")


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid[0])
def test_a_mask_lies_on_the_voxels_of_its_scan(model: Path, tmp_path: Path, grid: tuple) -> None:
    axes, spacing, angles = grid
    affine = oblique(spacing, angles, axes)
    save_nifti(tmp_path / "t2.nii.gz", scan(), affine)
    out = tmp_path / "new" / "mask.nii.gz"
    words = ["predict", str(model), str(tmp_path / "t2.nii.gz"), "--out", str(out), "--probability"]
    assert main(words) == 0
    given, mask = (nibabel.load(path) for path in (tmp_path / "t2.nii.gz", out))
    map_ = nibabel.load(out.with_name("mask_probability.nii.gz"))
    for written in (mask, map_):
        assert written.shape == given.shape and np.array_equal(written.affine, given.affine)
        assert int(written.header["sform_code"]) and int(written.header["qform_code"])
        np.testing.assert_allclose(written.header.get_qform(), given.affine, atol=1e-4)  # what ITK goes by
    probabilities = np.asarray(map_.dataobj)
    assert mask.get_data_dtype() == np.uint8 and np.array_equal(np.asarray(mask.dataobj), probabilities >= 0.5)
    assert 0 <= probabilities.min() < probabilities.max() <= 1 and len(np.unique(probabilities)) > 100
    assert sorted(path.name for path in out.parent.iterdir()) == ["mask.nii.gz", "mask_probability.nii.gz"]


def test_a_dicom_series_gives_the_mask_of_the_same_nifti(model: Path, tmp_path: Path) -> None:
    save_nifti(tmp_path / "nifti" / "a.nii.gz", scan(), LPS)
    save_series(tmp_path / "dicom" / "patient" / "t2", scan(), LPS)
    files = [load_model(model)]
    for kind in ("nifti", "dicom"):
        predict_volumes(files, tmp_path / kind, tmp_path / f"{kind}-out", probability=True)
    one = open_volume(tmp_path / "nifti-out" / "probabilities" / "a.nii.gz")
    other = open_volume(tmp_path / "dicom-out" / "probabilities" / "patient" / "t2.nii.gz")
    np.testing.assert_allclose(other.geometry.affine, one.geometry.affine, atol=1e-5)
    np.testing.assert_allclose(other.read(), one.read(), atol=1e-5)
    alone = predict_volumes(files, tmp_path / "dicom" / "patient" / "t2", tmp_path / "t2.nii.gz")
    assert alone.files == [tmp_path / "t2.nii.gz"]


def test_an_object_stays_at_its_place_whatever_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 'network' that marks what is brighter than the mean: the mask must be the bright block on every grid."""
    from heterosync.methods.prostate_ahnet import ProstateAHNet

    monkeypatch.setattr(ProstateAHNet, "predict", lambda self, model, images, partner: torch.sigmoid(9 * images))
    segmenter = open_segmenter([load_model(toy_segmenter(tmp_path / "m.pt", spacing=1.0))])
    shape = (26, 24, 12)
    block = np.zeros(shape, np.float32)
    block[5:19, 4:13, 3:8] = 1
    for axes, spacing, angles in GRIDS:
        save_nifti(tmp_path / "x.nii.gz", block, oblique(spacing, angles, axes, shape))
        found = segmenter.probabilities(open_volume(tmp_path / "x.nii.gz")) >= 0.5
        assert dice_coefficient(torch.from_numpy(found), torch.from_numpy(block > 0)) > 0.93


def test_an_ensemble_is_the_mean_of_its_models(model: Path, tmp_path: Path) -> None:
    other = toy_segmenter(tmp_path / "other.pt", seed=1)
    save_nifti(tmp_path / "t2.nii.gz", scan())
    maps = []
    for number, models in enumerate(([model], [other], [model, other])):
        out = tmp_path / f"{number}.nii.gz"
        assert (
            main(["predict", *map(str, models), str(tmp_path / "t2.nii.gz"), "--out", str(out), "--probability"]) == 0
        )
        maps.append(open_volume(out.with_name(f"{number}_probability.nii.gz")).read())
    np.testing.assert_allclose(maps[2], (maps[0] + maps[1]) / 2, atol=1e-6)
    assert np.abs(maps[0] - maps[1]).max() > 0.01
    with pytest.raises(UserError, match="alike.pt has another spacing than .*best_model.pt"):
        open_segmenter([load_model(model), load_model(toy_segmenter(tmp_path / "alike.pt", spacing=3.0))])


def test_a_site_folder_is_scored_and_shown(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = toy_volume_site(tmp_path / "site")
    assert main(["predict", str(model), str(site), "--out", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    with (tmp_path / "out" / "cases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"images/{number}.nii.gz" for number in range(5)]
    for row in rows:
        found, drawn = (
            torch.from_numpy(np.asarray(nibabel.load(path).dataobj))
            for path in (tmp_path / "out" / row["mask"], site / row["image"].replace("images", "masks"))
        )
        assert float(row["dice"]) == pytest.approx(dice_coefficient(found, drawn))
        assert float(row["volume"]) == pytest.approx(int(found.sum()) * 8 / 1000)
    assert told["metrics"]["dice"] == pytest.approx(np.mean([float(row["dice"]) for row in rows]))
    assert (tmp_path / "out" / "overlays.svg").is_file()
    # grids of 2 mm that are not turned: resampling changes nothing, and the site's own scores are the same
    file = load_model(model)
    method, network = file.build()
    data = SEGMENTATION.load(site, method.training, False, False)
    own = VolumeExamples(method, data, "site", torch.device("cpu"), "float32").evaluate(network, "test")
    assert own.cases[0].dice == pytest.approx(float(rows[4]["dice"]), abs=1e-3)


def test_nothing_is_written_where_a_scan_is_bad(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scans"
    save_nifti(folder / "good.nii.gz", scan())
    save_nifti(folder / "constant.nii.gz", np.full_like(scan(), 7))
    save_nifti(folder / "nan.nii.gz", np.full(scan().shape, np.nan, np.float32))
    out = str(tmp_path / "out")
    assert main(["predict", str(model), str(folder), "--out", out]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "constant.nii.gz: every voxel is 7" in lines[0] and "nan.nii.gz: has NaN" in lines[1]
    cut = save_nifti(folder / "cut.nii.gz", scan(1))
    cut.write_bytes(cut.read_bytes()[:600])
    save_nifti(folder / "flat.nii.gz", scan()[:, :, 0], np.eye(4))
    save_nifti(folder / "four.nii.gz", np.stack([scan(), scan()], -1), LPS)
    save_series(folder / "gap", scan(), LPS)
    (folder / "gap" / "003.dcm").unlink()
    (folder / "good.nii").write_bytes(b"")
    assert main(["predict", str(model), str(folder), "--out", out]) == 1
    told = capsys.readouterr().err
    for words in (
        "cut.nii.gz: truncated",
        "a 2-D image",
        "a 4-D image",
        "gap: a slice is missing",
        "good: 2 volumes have this name",
    ):
        assert words in told
    assert not Path(out).exists() and "Traceback" not in told


def test_the_size_is_told_before_memory_is_taken(model: Path, tmp_path: Path) -> None:
    header_alone(tmp_path / "thick.nii", (300, 300, 300), 10)  # 27 million voxels, but 3.4 thousand million at 2 mm
    with pytest.raises(UserError, match=r"thick.nii: 1496 x 1496 x 1496 voxels at 2 mm, 12.5 GiB"):
        predict_volumes([load_model(model)], tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["thick.nii"]


def test_wrong_words_of_the_command(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    volume_site(tmp_path / "data" / "site", 2)
    pictures = toy_model(tmp_path / "pictures.pt")
    one = save_nifti(tmp_path / "one.nii.gz", scan())
    (tmp_path / "empty").mkdir()
    for words, told in (
        ([model, tmp_path / "data", "--out", "m"], f"holds site folders: name one of them, for example {tmp_path}"),
        ([model, tmp_path / "data" / "site", "--out", "m.nii.gz"], "m.nii.gz is one file"),
        ([model, one, "--out", "m.nii"], "masks are compressed: name it m.nii.gz"),
        ([model, tmp_path / "empty", "--out", "m"], "holds no volume"),
        ([model, tmp_path / "absent", "--out", "m"], "absent does not exist"),
        ([model, one, "--out", "m", "--partner", "self"], "--partner is not for models of segmentation"),
        ([model, one, "--out", "m", "--batch-size", "2"], "--batch-size is not for models of segmentation"),
        ([pictures, one, "--out", "m", "--probability"], "--probability is not for models of classification"),
        ([model, pictures, one, "--out", "m"], "pictures.pt is for classification"),
        ([pictures, pictures, one, "--out", "m"], "pictures are scored by one model"),
        ([model, one, "--out", "m", "--device", "abacus"], "--device abacus: not usable here"),
    ):
        assert main(["predict", *map(str, words)]) == 1, words
        assert told in capsys.readouterr().err, words
    assert not Path("m").exists()


def test_a_mask_of_another_grid_is_refused_and_one_in_another_order_is_not(model: Path, tmp_path: Path) -> None:
    rows = volume_site(tmp_path / "site", 2)
    shutil.copy(tmp_path / "site" / rows[0][1], tmp_path / "kept.nii.gz")
    save_nifti(tmp_path / "site" / rows[0][1], np.ones((14, 12, 7), np.uint8))
    with pytest.raises(UserError, match="masks/0.nii.gz: the mask has 14 x 12 x 7 voxels, the image 14 x 12 x 6"):
        open_scans(tmp_path / "site")
    kept = nibabel.load(tmp_path / "kept.nii.gz")
    turned = kept.as_reoriented(nibabel.orientations.axcodes2ornt("PSL"))
    nibabel.save(turned, tmp_path / "site" / rows[0][1])
    organ = open_scans(tmp_path / "site")[0].organ()
    assert np.array_equal(organ, np.asarray(kept.dataobj) > 0)
