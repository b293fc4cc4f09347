"""The anchor pack: one digest for the same pictures however they are stored, and nothing else passes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_toys import picture, save_png
from heterosync.data.anchor import anchor_digest, load_anchor, read_anchor_info, write_anchor
from heterosync.data.images import content_hash
from heterosync.data.readers import to_size
from heterosync.errors import ProblemList, UserError

PICTURES = picture(1, (8, 9, 7))
LABELS = np.array([0, 1] * 4)


def write(folder: Path, pictures=PICTURES, labels=LABELS, **options) -> str:
    return write_anchor(folder, pictures, labels, "toy", "off", "on", **options)


def as_png(npz: Path, folder: Path, convert=lambda pixels: pixels, names=("off", "on")) -> Path:
    """The same pack as image files."""
    folder.mkdir()
    shutil.copy(npz / "anchor.json", folder)
    pack = np.load(npz / "anchor.npz")
    lines = ["image,label"]
    for i, (pixels, label) in enumerate(zip(pack["images"][::-1], pack["labels"][::-1], strict=True)):
        save_png(folder / f"images/{i}.png", convert(pixels))
        lines.append(f"images/{i}.png,{names[label]}")
    (folder / "anchor.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_info(tmp_path: Path):
    digest = write(tmp_path / "a")
    info = read_anchor_info(tmp_path / "a")
    assert (info.name, info.digest, info.n, info.labels, info.balanced) == ("toy", digest, 8, ("off", "on"), True)
    assert len(digest) == 64


def test_digest_is_the_same_for_npz_png_and_grey_as_rgb(tmp_path: Path):
    digest = write(tmp_path / "npz")
    png = as_png(tmp_path / "npz", tmp_path / "png")
    rgb = as_png(tmp_path / "npz", tmp_path / "rgb", lambda pixels: np.repeat(pixels[..., None], 3, axis=2), (0, 1))
    assert anchor_digest(tmp_path / "npz") == anchor_digest(png) == anchor_digest(rgb) == digest
    same = [load_anchor(folder, 7, cache=tmp_path) for folder in (tmp_path / "npz", png, rgb)]
    for other in same[1:]:
        assert (other.pixels == same[0].pixels).all() and (other.labels == same[0].labels).all(), "order as well"


def test_digest_ignores_order_and_notices_a_pixel_a_label_and_a_shape(tmp_path: Path):
    digest = write(tmp_path / "a")
    order = np.random.default_rng(0).permutation(8)
    assert write(tmp_path / "b", PICTURES[order], LABELS[order]) == digest
    assert (tmp_path / "a/anchor.npz").read_bytes() == (tmp_path / "b/anchor.npz").read_bytes()
    changed = PICTURES.copy()
    changed[3, 4, 5] ^= 1
    assert write(tmp_path / "c", changed) != digest
    assert write(tmp_path / "d", PICTURES, 1 - LABELS) != digest
    assert write(tmp_path / "e", PICTURES.reshape(8, 7, 9)) != digest


def test_digest_does_not_depend_on_the_size_of_training(tmp_path: Path):
    digest = write(tmp_path / "a")
    for size in (4, 16):
        load_anchor(tmp_path / "a", size, cache=tmp_path)
        assert anchor_digest(tmp_path / "a") == digest


def test_pictures_of_several_shapes_become_files(tmp_path: Path):
    pictures = [picture(i, (6 + i, 8)) for i in range(4)]
    digest = write(tmp_path / "a", pictures, [0, 1, 0, 1])
    assert (tmp_path / "a/anchor.csv").is_file() and anchor_digest(tmp_path / "a") == digest


def test_load(tmp_path: Path):
    write(tmp_path / "a")
    images = load_anchor(tmp_path / "a", 5, 3)
    assert images.pixels.shape == (8, 3, 5, 5) and sorted(images.labels) == [0] * 4 + [1] * 4
    expected = {content_hash(p): (to_size(p, 5, 3), label) for p, label in zip(PICTURES, LABELS, strict=True)}
    for row, key in enumerate(sorted(expected)):
        assert (images.pixels[row] == expected[key][0]).all() and images.labels[row] == expected[key][1]


def test_unbalanced_only_when_declared(tmp_path: Path):
    with pytest.raises(ProblemList, match="3 negative but 2 positive"):
        write(tmp_path / "a", PICTURES[:5], [0, 0, 0, 1, 1])
    write(tmp_path / "a", PICTURES[:5], [0, 0, 0, 1, 1], balanced=False)
    assert len(load_anchor(tmp_path / "a", 4)) == 5
    info = json.loads((tmp_path / "a/anchor.json").read_text())
    (tmp_path / "a/anchor.json").write_text(json.dumps(info | {"balanced": True}))
    with pytest.raises(ProblemList, match="3 negative but 2 positive"):
        load_anchor(tmp_path / "a", 4)


@pytest.mark.parametrize(
    ("pictures", "labels", "match"),
    [
        (PICTURES, [0] * 8, "both classes are needed"),
        (PICTURES, [0, 1, 2, 1, 0, 1, 0, 1], "labels other than 0 and 1"),
        (PICTURES, [0.2, 1.0] * 4, "anchor 'toy': the labels are of type float64: store whole numbers, 0 and 1"),
        (PICTURES, ["0", "1"] * 4, "labels are of type <U1"),
        (PICTURES, [0, 1], "one label per picture"),
        (np.stack([PICTURES[0]] * 4), [0, 1, 0, 1], "3 pictures occur twice"),
        (np.full((2, 3, 3), np.nan), [0, 1], "NaN"),
    ],
)
def test_write_refuses(tmp_path: Path, pictures, labels, match):
    with pytest.raises(UserError, match=match):
        write(tmp_path / "a", pictures, labels)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_table_as_a_spreadsheet_saves_it(tmp_path: Path, separator):
    digest = write(tmp_path / "npz")
    table = as_png(tmp_path / "npz", tmp_path / "png") / "anchor.csv"
    table.write_text(table.read_text().replace(",", separator), encoding="utf-8-sig")
    assert anchor_digest(tmp_path / "png") == digest


def test_write_never_replaces(tmp_path: Path):
    write(tmp_path / "a")
    with pytest.raises(UserError, match="exists already"):
        write(tmp_path / "a")
