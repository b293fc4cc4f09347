"""Every image format against pixels computed independently."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

from data_toys import picture, save_png, scaled
from heterosync.data.grey import to_uint8
from heterosync.data.packs import Pack, split_entry
from heterosync.data.readers import ImageReader, read_image, to_size
from heterosync.errors import UserError


def test_png_grey_and_colour(tmp_path: Path):
    grey, colour = picture(1), picture(2, (9, 7, 3))
    assert (read_image(save_png(tmp_path / "g.png", grey)) == grey).all()
    assert (read_image(save_png(tmp_path / "c.png", colour)) == colour).all()


def test_alpha_is_dropped_and_palette_resolved(tmp_path: Path):
    rgba = picture(3, (8, 8, 4))
    assert (read_image(save_png(tmp_path / "a.png", rgba)) == rgba[..., :3]).all()
    palette = Image.fromarray(picture(4, (8, 8, 3))).quantize(16)
    palette.save(tmp_path / "p.png")
    assert (read_image(tmp_path / "p.png") == np.asarray(palette.convert("RGB"))).all()


def test_one_bit_png(tmp_path: Path):
    mask = picture(5) > 128
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert (read_image(tmp_path / "m.png") == mask * np.uint8(255)).all()


def test_sixteen_bit_png_is_scaled_from_its_minimum_to_its_maximum(tmp_path: Path):
    values = (picture(6, dtype=np.uint16) // 8 + 300).astype(np.uint16)
    got = read_image(save_png(tmp_path / "x.png", values))
    assert got.dtype == np.uint8
    assert (got == scaled(values, values.min(), values.max())).all()
    assert (read_image(tmp_path / "x.png", window=(4000, 2001)) == scaled(values, 2999.5, 4999.5)).all()


def test_jpeg(tmp_path: Path):
    Image.fromarray(picture(7, (16, 16, 3))).save(tmp_path / "x.jpg")
    assert (read_image(tmp_path / "x.jpg") == np.asarray(Image.open(tmp_path / "x.jpg"))).all()


def test_npy_and_constant_picture(tmp_path: Path):
    values = np.random.default_rng(8).normal(size=(6, 5)).astype(np.float32)
    np.save(tmp_path / "x.npy", values)
    assert (read_image(tmp_path / "x.npy") == scaled(values, values.min(), values.max())).all()
    np.save(tmp_path / "flat.npy", np.full((4, 4, 1), 7.5))
    assert (read_image(tmp_path / "flat.npy") == np.zeros((4, 4))).all()


def test_nifti_slice_has_rows_first(tmp_path: Path):
    values = picture(9, (12, 10), np.uint16).astype(np.int32)  # (y, x)
    image = nibabel.Nifti1Image(values.T[:, :, None].astype(np.int16), np.diag([-1, -1, 1, 1]))  # as DICOM: LPS
    nibabel.save(image, tmp_path / "x.nii.gz")
    stored = values.astype(np.int16)
    assert (read_image(tmp_path / "x.nii.gz") == scaled(stored, stored.min(), stored.max())).all()


def placed(codes: str, values: np.ndarray, path: Path) -> Path:
    """Save `values` whose axes point to `codes` ("RAS": right, anterior, superior), with their spacing and origin."""
    affine = np.zeros((4, 4))
    for axis, code in enumerate(codes):
        row = ["RL", "AP", "SI"].index(next(pair for pair in ("RL", "AP", "SI") if code in pair))
        affine[row, axis] = (1 if code in "RAS" else -1) * (0.7, 0.8, 3)[axis]
    affine[:, 3] = (11, -20, 5, 1)
    nibabel.save(nibabel.Nifti1Image(values, affine), path)
    return path


def test_nifti_axial_slice_is_shown_alike_whatever_its_affine(tmp_path: Path):
    shown = np.tile(np.int16([[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]), (2, 2))  # row 0 anterior, column 0 right
    shown[0, 0] = 40
    expected = scaled(shown, 1, 40)
    ras = shown[::-1, ::-1].T  # x to the right, y to the front
    ways = {
        "RAS": ras[:, :, None],
        "LPS": shown.T[:, :, None],  # DICOM's own order
        "LAS": shown[::-1].T[:, :, None],
        "ARS": ras.T[:, :, None],  # axes swapped
        "PLI": shown[:, :, None],
        "SLP": shown.T[None],
    }
    for codes, values in ways.items():
        got = read_image(placed(codes, values, tmp_path / f"{codes}.nii.gz"))
        assert got.shape == shown.shape and (got == expected).all(), codes
    flat = nibabel.Nifti1Image(ras, np.diag([0.7, 0.8, 3, 1]))
    nibabel.save(flat, tmp_path / "flat.nii")
    assert (read_image(tmp_path / "flat.nii") == expected).all(), "a file of two dimensions"
    tilted = np.diag([0.7, 0.8, 3, 1.0])
    tilted[:3, :3] = [[0.98, 0.17, 0], [-0.17, 0.98, 0], [0, 0, 1]] @ tilted[:3, :3]
    nibabel.save(nibabel.Nifti1Image(ras[:, :, None], tilted), tmp_path / "tilted.nii")
    assert (read_image(tmp_path / "tilted.nii") == expected).all(), "the closest axes"


def test_nifti_coronal_and_sagittal_slices_stand_upright(tmp_path: Path):
    coronal, sagittal = np.zeros((5, 1, 7), np.int16), np.zeros((1, 5, 7), np.int16)  # RAS: x, y, z
    coronal[4, 0, 6] = sagittal[0, 4, 6] = 9  # right and superior; anterior and superior
    for name, values in (("cor", coronal), ("sag", sagittal)):
        got = read_image(placed("RAS", values, tmp_path / f"{name}.nii"))
        assert got.shape == (7, 5) and got[0, 0] == 255 and got.sum() == 255


def test_nifti_without_usable_affine(tmp_path: Path):
    image = nibabel.Nifti1Image(np.zeros((4, 5), np.int16), None)
    image.header.set_sform(np.diag([1.0, 1, 0, 1]), code=1)
    nibabel.save(image, tmp_path / "x.nii")
    with pytest.raises(UserError, match=r"x\.nii: the NIfTI affine does not orient all three axes: export"):
        read_image(tmp_path / "x.nii")


def test_nifti_volume_is_refused(tmp_path: Path):
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.int16), np.eye(4)), tmp_path / "v.nii")
    with pytest.raises(UserError, match=r"v\.nii: a NIfTI volume of shape \(4, 5, 6\), not a 2-D slice"):
        read_image(tmp_path / "v.nii")


# -------------------------------------------------------------------------------------------------------------- packs


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(9, 6, 5), (9, 6, 5, 3)])
def test_pack_entries_in_any_order(tmp_path: Path, save, shape):
    images = picture(18, shape)
    save(tmp_path / "pack.npz", labels=np.zeros(9), images=images)
    reader = ImageReader(tmp_path)
    for row in (0, 3, 2, 8, 0, 5):
        assert (reader.read(f"pack.npz#{row}") == images[row]).all()
    assert (read_image(f"{tmp_path}/pack.npz#4") == images[4]).all()


def test_uncompressed_pack_is_mapped_and_compressed_one_streamed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("heterosync.data.packs.RECENT_BYTES", 60)
    images = picture(19, (50, 6, 5))
    np.savez(tmp_path / "a.npz", images=images)
    np.savez_compressed(tmp_path / "b.npz", images=images)
    assert isinstance(Pack(tmp_path / "a.npz")._map, np.memmap)
    pack = Pack(tmp_path / "b.npz")
    assert all((pack[row] == images[row]).all() for row in (49, 10, 9, 0, 30))
    assert len(pack._recent) <= 2


def test_entry_names():
    assert split_entry("a/b.npz#12") == ("a/b.npz", 12)
    assert split_entry("a#3.png") == ("a#3.png", None)


# ----------------------------------------------------------------------------------------------------------- resizing


def test_to_size_is_pillows_bicubic_without_aspect():
    grey, colour = picture(20, (30, 50)), picture(21, (30, 50, 3))
    expected = np.asarray(Image.fromarray(grey).resize((16, 16), Image.Resampling.BICUBIC))
    got = to_size(grey, 16, 3)
    assert got.shape == (3, 16, 16) and got.dtype == np.uint8
    assert all((got[channel] == expected).all() for channel in range(3))
    expected = np.asarray(Image.fromarray(colour).resize((16, 16), Image.Resampling.BICUBIC))
    assert (to_size(colour, 16, 3) == expected.transpose(2, 0, 1)).all()
    assert to_size(colour, 16, 1).shape == (1, 16, 16)
    assert (to_size(grey[:, :30], 30, 1) == grey[None, :, :30]).all(), "the right size stays as it is"


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (2, 3, 4, 5), (0, 4)])
def test_to_uint8_refuses_other_shapes(shape):
    with pytest.raises(UserError, match="expected|not"):
        to_uint8(np.zeros(shape))
