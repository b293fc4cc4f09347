"""Volumes from NIfTI, MetaImage and DICOM series: one place in the patient, whatever the format."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_toys import picture, write_dicom
from heterosync.data.volume_geometry import Geometry
from heterosync.data.volumes import open_volume, write_nifti
from heterosync.errors import UserError
from volume_toys import SHAPE, oblique, save_metaimage, save_nifti, save_series, scan

LPS = oblique(axes="LPS")


@pytest.mark.parametrize("axes", ["LPS", "RAS", "PSR", "LAI"])
def test_every_format_gives_the_same_values_at_the_same_places(tmp_path: Path, axes: str) -> None:
    affine, values = oblique(axes=axes), scan(1)
    paths = [save_nifti(tmp_path / "a.nii.gz", values, affine), save_metaimage(tmp_path / "a.mhd", values, affine)]
    if axes in ("LPS", "RAS"):  # slices of a series ascend along the normal of their axes
        paths.append(save_series(tmp_path / "series", values, affine))
    for path in paths:
        volume = open_volume(path)
        assert volume.geometry.shape == SHAPE and volume.geometry.orientation == axes, path
        np.testing.assert_allclose(volume.geometry.affine, affine, atol=1e-4)
        np.testing.assert_array_equal(volume.read(), values)


def test_a_written_volume_is_read_as_it_was_and_is_the_same_file_again(tmp_path: Path) -> None:
    for name, values in {"a": scan(2), "b": scan(2) > 500, "c": scan(2) / 7}.items():
        write_nifti(tmp_path / f"{name}.nii.gz", values, LPS)
        volume = open_volume(tmp_path / f"{name}.nii.gz")
        np.testing.assert_allclose(volume.read(), values, rtol=1e-6)
        np.testing.assert_allclose(volume.geometry.affine, LPS, atol=1e-5)
        first = (tmp_path / f"{name}.nii.gz").read_bytes()
        write_nifti(tmp_path / f"{name}.nii.gz", values, LPS)
        assert (tmp_path / f"{name}.nii.gz").read_bytes() == first


def test_compressed_and_big_endian_metaimage(tmp_path: Path) -> None:
    import zlib

    values = scan(3)
    path = save_metaimage(tmp_path / "a.mhd", values, LPS)
    header = path.read_text().replace("CompressedData = False", "CompressedData = True").replace("a.raw", "a.zraw")
    path.write_text(header.replace("OrderMSB = False", "OrderMSB = True"))
    (tmp_path / "a.zraw").write_bytes(zlib.compress(values.astype(">i2").tobytes(order="F")))
    np.testing.assert_array_equal(open_volume(path).read(), values)
    local = path.read_text().replace("a.zraw", "LOCAL").encode() + (tmp_path / "a.zraw").read_bytes()
    (tmp_path / "b.mha").write_bytes(local)
    np.testing.assert_array_equal(open_volume(tmp_path / "b.mha").read(), values)


def test_one_channel_of_a_4d_file_and_rescaled_dicom(tmp_path: Path) -> None:
    stack = np.stack([scan(1), scan(2)], axis=-1)
    path = save_nifti(tmp_path / "4d.nii.gz", stack, LPS)
    np.testing.assert_array_equal(open_volume(path, channel=1).read(), scan(2))
    save_series(tmp_path / "s", scan(1), LPS, RescaleSlope=0.5, RescaleIntercept=-10)
    np.testing.assert_allclose(open_volume(tmp_path / "s").read(), scan(1) * 0.5 - 10)


def broken(folder: Path) -> dict[str, str]:
    """What is wrong by name, and the words that must be said of it."""
    save_nifti(folder / "2d.nii.gz", picture(0), np.eye(4))
    save_nifti(folder / "4d.nii.gz", np.stack([scan(), scan()], axis=-1), LPS)
    save_nifti(folder / "flat.nii.gz", scan()[:, :, :1], LPS)
    nan = scan().astype(np.float32)
    nan[0, 0, 0] = np.nan
    save_nifti(folder / "nan.nii.gz", nan, LPS)
    whole = save_nifti(folder / "whole.nii.gz", scan(), LPS).read_bytes()
    (folder / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.nii.gz").write_bytes(b"")
    (folder / "text.nii.gz").write_text("no image")
    (folder / "x.png").write_text("no volume")
    nowhere = nibabel.Nifti1Image(scan(), None)
    nibabel.save(nowhere, folder / "nowhere.nii.gz")
    save_metaimage(folder / "short.mhd", scan(), LPS)
    (folder / "short.raw").write_bytes(b"12")
    save_metaimage(folder / "alone.mhd", scan(), LPS)
    (folder / "alone.raw").unlink()
    save_metaimage(folder / "flat.mhd", scan(), LPS)
    lines = (folder / "flat.mhd").read_text()
    (folder / "flat.mhd").write_text(re.sub("TransformMatrix = .*", "TransformMatrix = 1 0 0 1 0 0 0 0 1", lines))

    save_series(folder / "gap", scan(), LPS)
    (folder / "gap" / "003.dcm").unlink()
    save_series(folder / "two", scan(), LPS)
    shutil.copy(folder / "two" / "003.dcm", folder / "two" / "copy.dcm")
    save_series(folder / "mixed", scan(), LPS)
    save_series(folder / "other", scan(), LPS, uid="1.2.4")
    shutil.copy(folder / "other" / "003.dcm", folder / "mixed" / "x.dcm")
    save_series(folder / "turned", scan(), LPS)
    save_series(folder / "tilted", scan(), oblique(axes="LPS", angles=(0, 0, 0)))
    shutil.copy(folder / "tilted" / "003.dcm", folder / "turned" / "003.dcm")
    (folder / "bare").mkdir()
    (folder / "bare" / "readme.txt").write_text("nothing")
    save_series(folder / "single", scan(), LPS)
    for path in sorted((folder / "single").iterdir())[1:]:
        path.unlink()
    write_dicom(folder / "frames" / "a.dcm", np.zeros((3, 4, 5), np.uint16))
    write_dicom(folder / "plain" / "a.dcm", picture(1))
    write_dicom(folder / "plain" / "b.dcm", picture(2))
    return {
        "absent.nii.gz": "does not exist",
        "2d.nii.gz": "a 2-D image of shape 12 x 10",
        "4d.nii.gz": "a 4-D image of shape 14 x 12 x 6 x 2",
        "flat.nii.gz": "a single slice",
        "nan.nii.gz": "NaN",
        "cut.nii.gz": "truncated or damaged",
        "empty.nii.gz": "0 bytes",
        "text.nii.gz": "truncated or damaged",
        "x.png": "unknown format",
        "nowhere.nii.gz": "does not tell the orientation",
        "short.mhd": "holds 2 bytes of values, its header tells of 2016",
        "alone.mhd": "does not lie beside it",
        "flat.mhd": "does not place the voxels",
        "gap": "a slice is missing between 004.dcm and 002.dcm",
        "two": "show the same slice",
        "mixed": "several DICOM series",
        "turned": "003.dcm has another ImageOrientationPatient",
        "bare": "no DICOM file",
        "single": "a single DICOM slice",
        "frames": "enhanced DICOM file of many slices",
        "plain": "no PixelSpacing",
    }


def test_what_is_no_volume_is_told_in_one_line(tmp_path: Path) -> None:
    for name, words in broken(tmp_path).items():
        with pytest.raises(UserError) as caught:
            open_volume(tmp_path / name).read()
        text = str(caught.value)
        assert text.startswith(f"{name}: ") and words in text and ": " in text.removeprefix(f"{name}: "), text
        assert "\n" not in text and str(tmp_path) not in text, text


def test_missing_slices_are_counted(tmp_path: Path) -> None:
    save_series(tmp_path / "s", scan(), LPS)
    for name in ("003.dcm", "004.dcm"):
        (tmp_path / "s" / name).unlink()
    with pytest.raises(UserError, match="2 slices are missing between 005.dcm and 002.dcm"):
        open_volume(tmp_path / "s")


def test_grids_are_compared_whatever_the_array_order() -> None:
    here = Geometry(SHAPE, LPS)
    axes = nibabel.orientations.axcodes2ornt("PSR")
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(LPS), axes)
    there = LPS @ nibabel.orientations.inv_ornt_aff(turn, SHAPE)
    other = Geometry(nibabel.apply_orientation(scan(), turn).shape, there)
    assert other.orientation == "PSR" and here.mismatch(other) is None
    moved = LPS.copy()
    moved[0, 3] += 2
    assert here.mismatch(Geometry(SHAPE, moved)) == "lies up to 2 mm beside the image"
    assert "voxels" in str(here.mismatch(Geometry((14, 12, 7), LPS)))
    mirrored = LPS @ np.diag([-1, 1, 1, 1])
    assert "mm beside" in str(here.mismatch(Geometry(SHAPE, mirrored)))


@pytest.mark.parametrize(("axes", "plane"), [("RAS", "axial"), ("RSA", "coronal"), ("PSL", "sagittal")])
def test_plane_of_the_slices(axes: str, plane: str) -> None:
    assert Geometry(SHAPE, oblique(axes=axes)).plane == plane
    assert Geometry(SHAPE, oblique((1, 1, 1.2), axes=axes)).plane is None
