"""DICOM files against pixels computed independently."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset

from data_toys import picture, scaled, write_dicom
from heterosync.data.readers import read_image
from heterosync.errors import UserError


def test_dicom_rescale_and_its_own_window(tmp_path: Path):
    stored = picture(10, (14, 11), np.uint16) // 16
    path = write_dicom(
        tmp_path / "ct.dcm", stored, RescaleSlope="1.5", RescaleIntercept="-1024", WindowCenter="40", WindowWidth="400"
    )
    hounsfield = stored * 1.5 - 1024
    assert (read_image(path) == scaled(hounsfield, 40 - 0.5 - 399 / 2, 40 - 0.5 + 399 / 2)).all()
    assert (read_image(path, window=(500, 2001)) == scaled(hounsfield, -500.5, 1499.5)).all(), "site.yaml wins"


def test_dicom_monochrome1_is_inverted_after_rescaling(tmp_path: Path):
    stored = picture(11, (14, 11), np.int16)
    tags = {"RescaleSlope": "2", "RescaleIntercept": "10"}
    straight = read_image(write_dicom(tmp_path / "two.dcm", stored, **tags))
    inverted = read_image(write_dicom(tmp_path / "one.dcm", stored, "MONOCHROME1", **tags))
    values = stored.astype(float) * 2 + 10
    assert (straight == scaled(values, values.min(), values.max())).all()
    assert (inverted == scaled(-values, -values.max(), -values.min())).all()
    assert abs(straight.astype(int) + inverted - 255).max() <= 1


@pytest.mark.parametrize(
    ("dtype", "tags", "low", "high"),
    [
        (np.uint16, {"PixelPaddingValue": 63536}, 63536, 63536),
        (np.int16, {"PixelPaddingValue": -2000}, -2000, -2000),
        (np.int16, {"PixelPaddingValue": -3000, "PixelPaddingRangeLimit": -2000}, -3000, -2000),
        (np.int16, {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -3000}, -3000, -2000),
        (np.uint16, {"PixelPaddingValue": 0}, 0, 0),
    ],
)
def test_dicom_padding_is_black_and_no_minimum_or_maximum(tmp_path: Path, dtype, tags, low, high):
    stored = np.random.default_rng(22).integers(200, 1200, (14, 11)).astype(dtype)
    stored[:3], stored[3, :4] = low, high
    padding = (stored >= low) & (stored <= high)
    assert padding.sum() == 37
    values = stored * 2.0 - 1024
    inside = values[~padding]
    rescale = {"RescaleSlope": "2", "RescaleIntercept": "-1024"}
    straight = np.where(padding, 0, scaled(values, inside.min(), inside.max()))
    inverted = np.where(padding, 0, scaled(-values, -inside.max(), -inside.min()))
    assert straight[~padding].min() == 0 and straight[~padding].max() == 255
    assert (read_image(write_dicom(tmp_path / "2.dcm", stored, **rescale, **tags)) == straight).all()
    path = write_dicom(tmp_path / "1.dcm", stored, "MONOCHROME1", **rescale, **tags)
    assert (read_image(path) == inverted).all()
    windowed = np.where(padding, 0, scaled(-values, -199.5, 800.5))  # centre -300, width 1001, inverted
    assert (read_image(path, window=(-300, 1001)) == windowed).all(), "black in a window too"


def test_dicom_padding_written_with_the_other_sign_and_padding_alone(tmp_path: Path):
    stored = np.array([[-2000, -2000, 5], [10, 20, 105]], np.int16)
    path = write_dicom(tmp_path / "x.dcm", stored)
    dataset = pydicom.dcmread(path)
    dataset.add_new("PixelPaddingValue", "US", 63536)  # -2000 as an unsigned number
    dataset.save_as(path)
    assert (read_image(path) == scaled(np.where(stored < 0, 5, stored), 5, 105)).all()
    flat = np.full((4, 4), 7, np.uint16)
    assert (read_image(write_dicom(tmp_path / "y.dcm", flat, "MONOCHROME1", PixelPaddingValue=7)) == 0).all()


def test_dicom_without_a_decoder_says_what_to_install(tmp_path: Path, monkeypatch):
    path = write_dicom(tmp_path / "x.dcm", picture(23))
    remedy = "pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, or convert the file to an uncompressed one"

    def line() -> str:
        with pytest.raises(UserError) as caught:
            read_image(path)
        return str(caught.value)

    monkeypatch.setattr("heterosync.data.dicom.get_decoder", lambda _: SimpleNamespace(is_available=False))
    assert line() == f"x.dcm: its compression (Explicit VR Little Endian) has no decoder here: {remedy}"
    monkeypatch.undo()

    def fail(_):
        raise RuntimeError("Unable to decode as exceptions were raised by all available plugins:\n  pillow: 12 bits")

    monkeypatch.setattr("heterosync.data.dicom.decode_pixels", fail)
    assert line() == f"x.dcm: its compression (Explicit VR Little Endian) cannot be decoded, or it is damaged: {remedy}"
    monkeypatch.undo()
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML  # no decoder exists for it
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    assert line().startswith("x.dcm: its compression (MPEG2 Main Profile / Main Level) has no decoder here: pip")


def test_dicom_first_of_several_windows_and_exact_function(tmp_path: Path):
    stored = picture(12, (6, 6), np.uint16)
    tags = {"WindowCenter": ["20000", "5"], "WindowWidth": ["30000", "7"], "VOILUTFunction": "LINEAR_EXACT"}
    assert (read_image(write_dicom(tmp_path / "x.dcm", stored, **tags)) == scaled(stored, 5000, 35000)).all()


def test_dicom_sigmoid_window(tmp_path: Path):
    stored = picture(13, (6, 6), np.uint16)
    path = write_dicom(tmp_path / "x.dcm", stored, WindowCenter="30000", WindowWidth="20000", VOILUTFunction="SIGMOID")
    expected = np.round(255 / (1 + np.exp(-4 * (stored.astype(float) - 30000) / 20000)))
    assert (read_image(path) == expected).all()


def test_dicom_voi_table(tmp_path: Path):
    stored = picture(14, (6, 6), np.uint8) % 4
    table = Dataset()
    table.LUTDescriptor = [4, 0, 16]
    table.add_new("LUTData", "US", [0, 10000, 50000, 65535])
    path = write_dicom(tmp_path / "x.dcm", stored, VOILUTSequence=[table])
    assert (read_image(path) == scaled(np.array([0, 10000, 50000, 65535])[stored], 0, 65535)).all()


def test_dicom_colour_and_file_without_suffix(tmp_path: Path):
    colour = picture(15, (6, 8, 3))
    assert (read_image(write_dicom(tmp_path / "IM000001", colour, "RGB")) == colour).all()


def test_dicom_of_several_frames_is_refused(tmp_path: Path):
    path = write_dicom(tmp_path / "us.dcm", picture(16, (5, 8, 8)))
    with pytest.raises(UserError, match=r"us\.dcm: a DICOM file of 5 frames: export the frame"):
        read_image(path)


def test_dicom_without_image_and_not_dicom(tmp_path: Path):
    path = write_dicom(tmp_path / "report.dcm", picture(17, (4, 4)))
    dataset = pydicom.dcmread(path)
    del dataset.PixelData
    dataset.save_as(path)
    with pytest.raises(UserError, match="holds no image"):
        read_image(path)
    (tmp_path / "text.dcm").write_text("hello " * 100)
    with pytest.raises(UserError, match=r"text\.dcm: not a DICOM file"):
        read_image(tmp_path / "text.dcm")
