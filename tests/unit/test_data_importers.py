"""Importers: folders per class, tables and npz files become collections without duplicates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heterosync.data.importers import from_csv, from_folder, from_npz
from heterosync.data.sources import open_collection


def pictures(count: int, seed: int = 0, size: int = 12) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size), dtype=np.uint8)


def save(path: Path, picture: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)
    return path


def test_folder_per_class_with_and_without_domains(tmp_path: Path) -> None:
    images = pictures(7)
    for i, place in enumerate(["benign", "benign", "malignant", "normal"]):
        save(tmp_path / "flat" / place / f"{i}.png", images[i])
    (tmp_path / "flat" / "benign" / "readme.txt").write_text("not an image")
    flat = from_folder(tmp_path / "flat", "benign", "malignant")
    assert flat.ids == ["benign/0.png", "benign/1.png", "malignant/2.png"]
    assert flat.labels.tolist() == [0, 0, 1] and flat.domains == [""] * 3
    assert flat.notes == ("sub-folder 'normal' left out", "1 files in 'benign' left out: no image format")
    assert (flat.image(2) == images[2]).all()

    for i, place in enumerate(["elbow/normal", "elbow/abnormal/deep/deeper", "wrist/normal"]):
        save(tmp_path / "deep" / place / f"{i}.png", images[4 + i])
    deep = from_folder(tmp_path / "deep", "normal", "abnormal")
    assert deep.labels.tolist() == [1, 0, 0] and deep.domains == ["elbow", "elbow", "wrist"]


def test_csv_with_own_columns_and_other_separator(tmp_path: Path) -> None:
    images = pictures(4)
    for i in range(4):
        save(tmp_path / "scans" / f"{i}.png", images[i])
    (tmp_path / "cases.csv").write_text(
        "\ufefffile;malignant;person;hospital\nscans/0.png;0;p1;north\nscans/1.png;1;p1;north\n"
        "scans/2.png;2;p2;south\nscans/3.png;1;p3;south\n",
        encoding="utf-8",
    )
    found = from_csv(
        tmp_path / "cases.csv",
        "0",
        "1",
        image_column="file",
        label_column="malignant",
        patient_column="person",
        domain_column="hospital",
    )
    assert found.labels.tolist() == [0, 1, 1]
    assert found.patients == ["p1", "p1", "p3"] and found.domains == ["north", "north", "south"]
    assert found.notes == ("1 images left out: label '2'",)
    assert (found.image(2) == images[3]).all()


def test_csv_of_pack_entries_becomes_an_array(tmp_path: Path) -> None:
    images = pictures(5)
    np.savez(tmp_path / "pack.npz", images=images)
    (tmp_path / "t.csv").write_text("image,label\npack.npz#4,n\npack.npz#1,p\n")
    found = from_csv(tmp_path / "t.csv", "n", "p")
    assert found.pixels is not None and (found.pixels == images[[4, 1]]).all()
    assert found.patients is None and found.ids == ["pack.npz#4", "pack.npz#1"]


def test_npz_class_names_and_numbers(tmp_path: Path) -> None:
    images, labels = pictures(6), np.array([0, 1, 2, 0, 1, 2])
    classes, names = np.array(["benign", "malignant", "normal"]), np.array([f"case {i}" for i in range(6)])
    np.savez(tmp_path / "a.npz", images=images, labels=labels, classes=classes, names=names)
    found = from_npz(tmp_path / "a.npz", "normal", "malignant")
    assert found.ids == ["case 1", "case 2", "case 4", "case 5"] and found.labels.tolist() == [1, 0, 1, 0]
    assert found.notes == ("2 images left out: label 'benign'",)
    np.savez(tmp_path / "b.npz", images=images[..., None], labels=labels[:, None], domains=np.array(list("aabbcc")))
    found = open_collection(tmp_path / "b.npz", "0", "2")
    assert found.domains == ["a", "b", "b", "c"] and found.pixels is not None and found.pixels.shape == (4, 12, 12)


def test_npz_in_medmnist_layout_and_float_images(tmp_path: Path) -> None:
    images, labels = pictures(6), np.array([[0], [1]] * 3)
    parts = {f"{part}_images": images[2 * i : 2 * i + 2] for i, part in enumerate(("train", "val", "test"))}
    np.savez(tmp_path / "m.npz", **parts, **{key.replace("images", "labels"): labels[:2] for key in parts})
    assert len(from_npz(tmp_path / "m.npz", "0", "1")) == 6
    np.savez(tmp_path / "f.npz", images=images / np.float32(255), labels=labels[:, 0])
    found = from_npz(tmp_path / "f.npz", "0", "1")
    assert found.pixels is not None and found.pixels.dtype == np.uint8
    assert found.pixels.min(axis=(1, 2)).tolist() == [0] * 6, "scaled image by image, as a site folder's reader does"


def test_duplicates_one_kept_and_contradictions_left_out(tmp_path: Path) -> None:
    images = pictures(6)
    images[3] = images[0]  # same label: the first stays
    images[4] = images[1]  # other label: neither stays
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 0, 1, 0, 1, 1]))
    found = from_npz(tmp_path / "a.npz", "0", "1")
    assert found.ids == ["a.npz#0", "a.npz#2", "a.npz#5"]
    assert found.notes == (
        "1 images left out: same content and label as another one",
        "2 images left out: same content but contradictory labels (a.npz#1, a.npz#4)",
    )


def test_duplicates_are_found_across_formats(tmp_path: Path) -> None:
    image = pictures(3)
    save(tmp_path / "n" / "grey.png", image[0])
    save(tmp_path / "n" / "same_as_rgb.png", np.repeat(image[0][..., None], 3, axis=2))
    np.save(tmp_path / "n" / "same.npy", image[0])
    save(tmp_path / "n" / "other.png", image[1])
    save(tmp_path / "p" / "positive.png", image[2])
    assert from_folder(tmp_path, "n", "p").ids == ["n/grey.png", "n/other.png", "p/positive.png"]


@pytest.mark.parametrize("suffix", [".csv", ".npz"])
def test_row_order_of_a_collection_is_that_of_its_source(tmp_path: Path, suffix: str) -> None:
    images, labels = pictures(8), np.array([1, 0] * 4)
    np.savez(tmp_path / "s.npz", images=images, labels=labels)
    rows = "\n".join(f"s.npz#{i},{label}" for i, label in enumerate(labels))
    (tmp_path / "s.csv").write_text(f"image,label\n{rows}\n")
    assert open_collection(tmp_path / f"s{suffix}", "0", "1").labels.tolist() == labels.tolist()
