"""Bad site folders, one kind per row of the table: the line that the user sees, and that loading is refused with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from data_toys import picture, save_png, write_dicom
from heterosync.data.anchor import write_anchor
from heterosync.data.check import check_site
from heterosync.data.dataset import load_site
from heterosync.data.readers import read_image
from heterosync.errors import ProblemList, UserError
from toys import toy_site

Breaking = Callable[[Path], object]


def put(name: str, text: str | bytes) -> Breaking:
    data = text if isinstance(text, bytes) else text.encode()
    return lambda folder: (folder / name).write_bytes(data)


def edit(name: str, old: str, new: str) -> Breaking:
    """Replace the first `old` in a text file."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def add_rows(*rows: str) -> Breaking:
    def change(folder: Path) -> None:
        with open(folder / "manifest.csv", "a") as file:
            file.writelines(row + "\n" for row in rows)

    return change


def add_image(name: str, save: Callable[[Path], object]) -> Breaking:
    """One more image, in row 42 of the manifest."""

    def change(folder: Path) -> None:
        save(folder / name)
        add_rows(f"{name},normal")(folder)

    return change


def columns(header: str, cells: Callable[[int], str]) -> Breaking:
    """Further columns for all rows."""

    def change(folder: Path) -> None:
        first, *rows = (folder / "manifest.csv").read_text().splitlines()
        rows = [f"{row},{cells(i)}" for i, row in enumerate(rows)]
        (folder / "manifest.csv").write_text("\n".join([f"{first},{header}", *rows]) + "\n")

    return change


def cut(name: str, part: float) -> Breaking:
    def change(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(part * len(data))])

    return change


def remove(name: str) -> Breaking:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return change


def cut_png(path: Path) -> None:
    save_png(path, picture(1, (64, 64)))
    path.write_bytes(path.read_bytes()[:2000])


def cut_jpeg(path: Path) -> None:
    save_png(path, picture(1, (64, 64)))
    path.write_bytes(path.read_bytes()[:1500])


def cut_dicom(path: Path) -> None:
    write_dicom(path, picture(1, (64, 64)))
    path.write_bytes(path.read_bytes()[:2000])


def changed_anchor(folder: Path) -> None:
    pack = dict(np.load(folder / "anchor/anchor.npz"))
    pack["images"][0, 0, 0] ^= 1
    np.savez(folder / "anchor/anchor.npz", **pack)


def anchor_with(**changes) -> Breaking:
    """Other arrays in anchor.npz; the digest in anchor.json stays."""

    def change(folder: Path) -> None:
        pack = dict(np.load(folder / "anchor/anchor.npz")) | changes
        np.savez(folder / "anchor/anchor.npz", **{name: array for name, array in pack.items() if array is not None})

    return change


def anchor_info(**changes) -> Breaking:
    def change(folder: Path) -> None:
        path = folder / "anchor/anchor.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def anchor_table(text: str) -> Breaking:
    def change(folder: Path) -> None:
        (folder / "anchor/anchor.npz").unlink()
        (folder / "anchor/anchor.csv").write_text(text)

    return change


def anchor_of_primary(folder: Path) -> None:
    images = np.load(folder / "images.npz")["images"]
    shutil.rmtree(folder / "anchor")
    write_anchor(folder / "anchor", images[[0, 30]], [0, 1], "toy", "off", "on")


THREE = ("train", "validation", "test")

# what was done to a good folder | a part of each line expected, in order
TABLE: list[tuple[str, Breaking, list[str]]] = [
    ("site folder gone", lambda folder: shutil.rmtree(folder), ["site: the site folder does not exist: create it"]),
    # site.yaml
    ("no config", remove("site.yaml"), ["site.yaml: the file is missing: write it"]),
    (
        "config is no YAML",  # what the label column is, and whether an anchor is needed, is not known then
        lambda folder: [put("site.yaml", "task: [a\nlabels: b")(folder), shutil.rmtree(folder / "anchor")],
        ["site.yaml line 2: not valid YAML"],
    ),
    (
        "labels stand twice",
        lambda folder: put("site.yaml", "task: toy\nlabels: [a, b]\nlabels: [b, a]\n")(folder),
        ["site.yaml line 3: the key 'labels' stands twice: keep one of them"],
    ),
    ("task is nearly another kind", put("site.yaml", "task: segmentaton\n"), ["did you mean 'segmentation'?"]),
    ("config is a list", put("site.yaml", "- task"), ["site.yaml: holds no keys"]),
    ("config is empty", put("site.yaml", ""), ["site.yaml: holds no keys"]),
    ("config is binary", put("site.yaml", b"\xff\xfe\x00"), ["site.yaml: not readable"]),
    ("unknown key", edit("site.yaml", "device", "devise"), ["unknown key 'devise': did you mean 'device'?"]),
    ("key missing", edit("site.yaml", "task: toy\n", ""), ["site.yaml: the key 'task' is missing: add it"]),
    ("one label", edit("site.yaml", "[normal, abnormal]", "[normal]"), ["labels = ['normal']: expected two names"]),
    ("equal labels", edit("site.yaml", "[normal, abnormal]", "[a, a]"), ["the two labels must differ"]),
    (
        "label is a list",
        edit("site.yaml", "[normal, abnormal]", "[[a], b]"),
        ["labels = [['a'], 'b']: expected a text"],
    ),
    ("unknown device", edit("site.yaml", "cpu", "gpu0"), ["device = 'gpu0': expected auto, cpu, cuda, cuda:1 or mps"]),
    ("batch of one", edit("site.yaml", "task", "batch_size: 1\ntask"), ["batch_size = '1': expected a whole number"]),
    ("batch of text", edit("site.yaml", "task", "batch_size: big\ntask"), ["batch_size = 'big': expected a whole"]),
    ("negative seed", edit("site.yaml", "task", "split_seed: -3\ntask"), ["split_seed = '-3': expected a whole"]),
    ("window of one", edit("site.yaml", "task", "window: 40\ntask"), ["window = '40': expected centre and width"]),
    ("window width 0", edit("site.yaml", "task", "window: [40, 0]\ntask"), ["expected centre and width"]),
    ("window NaN", edit("site.yaml", "task", "window: [nan, 40]\ntask"), ["expected centre and width"]),
    ("columns clash", edit("site.yaml", "task", "label_column: image\ntask"), ["two of the column keys name the same"]),
    # manifest.csv
    ("no manifest", remove("manifest.csv"), ["manifest.csv: the file is missing: write it"]),
    ("manifest empty", put("manifest.csv", ""), ["manifest.csv: the file is empty"]),
    ("manifest blank", put("manifest.csv", "\n\n"), ["manifest.csv: the file is empty"]),
    ("header only", put("manifest.csv", "image,label\n"), ["manifest.csv: no row below the header"]),
    (
        "no label column",
        edit("manifest.csv", "label", "class"),
        ["the column 'label' is missing (known: class, image): add it, or set label_column in site.yaml"],
    ),
    (
        "label column of the config absent",
        edit("site.yaml", "task", "label_column: lable\ntask"),
        ["the column 'lable' is missing (did you mean 'label'? known: image, label): add it, or correct label_column"],
    ),
    (
        "patient column of the config absent",
        lambda f: (
            columns("person", lambda i: f"p{i // 4}")(f),
            edit("site.yaml", "task", "patient_column: persn\ntask")(f),
        ),
        ["column 'persn' is missing (did you mean 'person'? known: image, label, person): add it, or correct or"],
    ),
    (
        "patient column set to its default but absent",
        edit("site.yaml", "task", "patient_column: patient\ntask"),
        ["the column 'patient' is missing (known: image, label): add it, or correct or remove patient_column"],
    ),
    (
        "split column of the config absent",
        lambda f: (
            columns("part", lambda i: THREE[i % 3])(f),
            edit("site.yaml", "task", "split_column: parts\ntask")(f),
        ),
        ["the column 'parts' is missing (did you mean 'part'? known: image, label, part): add it, or correct or"],
    ),
    *(
        (
            f"patient column named {name}",
            columns(name, lambda i: f"p{i // 4}"),
            [f"is the column '{name}' the patient? set patient_column: {name} in site.yaml, or rename the column"],
        )
        for name in ("patient_id", "PatientID", "PID", "Subject", "Patient ID", "Patient")
    ),
    *(
        (
            f"split column named {name}",
            columns(name, lambda i: THREE[i % 3]),
            [f"is the column '{name}' the split? set split_column: {name} in site.yaml, or rename the column"],
        )
        for name in ("fold", "Set", "SPLIT")
    ),
    ("no header", put("manifest.csv", "images.npz#0,normal\n"), ["the column 'image' is", "the column 'label' is"]),
    ("column twice", edit("manifest.csv", "label", "label,label"), ["the column 'label' stands there twice"]),
    ("Latin-1", put("manifest.csv", "image,label\nä.png,normal\n".encode("latin-1")), ["not UTF-8 text: save it"]),
    ("open quote", add_rows('"x.png,normal'), ["manifest.csv: not a CSV file"]),
    (
        "manifest is a folder",
        lambda f: (remove("manifest.csv")(f), (f / "manifest.csv").mkdir()),
        ["a folder stands in"],
    ),
    ("label outside", edit("manifest.csv", "#3,normal", "#3,sick"), ["manifest.csv row 5: label 'sick' is neither"]),
    ("label empty", edit("manifest.csv", "#3,normal", "#3,"), ["row 5: label '' is neither 'normal' nor 'abnormal'"]),
    ("image empty", edit("manifest.csv", "images.npz#3,", ","), ["row 5: no image name: fill it in"]),
    (
        "too many values",
        edit("manifest.csv", "#3,normal", "#3,normal,x"),
        ["row 5: 3 values for 2 columns: quote values that hold the separator"],
    ),
    (
        "too few values",
        edit("manifest.csv", "#3,normal", "#3"),
        ["row 5: 1 values for 2 columns: fill in what is missing"],
    ),
    ("duplicate row", add_rows("images.npz#0,normal"), ["row 42: images.npz#0 stands in row 2 already"]),
    ("absolute path", add_rows("/data/x.png,normal"), ["row 42: the image is given by an absolute path"]),
    ("drive path", add_rows("C:\\x.png,normal"), ["row 42: the image is given by an absolute path"]),
    ("path upwards", add_rows("a/../../x.png,normal"), ["row 42: 'a/../../x.png' leads out of the site folder"]),
    (
        "two rows, two lines",
        add_rows("a.png,normal", "b.png,normal"),
        ["row 42: a.png: the file", "row 43: b.png: the"],
    ),
    # image files
    ("absent", add_rows("x.png,normal"), ["row 42: x.png: the file does not exist: copy it there or delete the row"]),
    ("zero bytes", add_image("x.png", lambda p: p.write_bytes(b"")), ["row 42: x.png: the file is empty (0 bytes)"]),
    ("cut PNG", add_image("x.png", cut_png), ["row 42: x.png: the file is truncated or damaged"]),
    ("cut JPEG", add_image("x.jpg", cut_jpeg), ["row 42: x.jpg: the file is truncated or damaged"]),
    ("cut DICOM", add_image("x.dcm", cut_dicom), ["row 42: x.dcm: the file is truncated or damaged"]),
    ("not an image", add_image("x.png", lambda p: p.write_text("hello")), ["row 42: x.png: the file is truncated or"]),
    ("unknown format", add_image("x.txt", lambda p: p.write_text("hello")), ["row 42: x.txt: unknown image format"]),
    ("no DICOM", add_image("x.dcm", lambda p: p.write_bytes(b"x" * 999)), ["row 42: x.dcm: not a DICOM file"]),
    ("frames", add_image("x.dcm", lambda p: write_dicom(p, picture(1, (3, 8, 8)))), ["a DICOM file of 3 frames"]),
    (
        "volume",
        add_image("x.nii", lambda p: nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4)), None), p)),
        ["volume"],
    ),
    (
        "cut NIfTI",
        add_image("x.nii.gz", lambda p: p.write_bytes(b"\x1f\x8b123")),
        ["row 42: x.nii.gz: the file is trunc"],
    ),
    ("NaN", add_image("x.npy", lambda p: np.save(p, np.full((4, 4), np.nan))), ["row 42: x.npy: the picture has NaN"]),
    ("infinite", add_image("x.npy", lambda p: np.save(p, np.array([[1, np.inf]]))), ["has NaN or infinite values"]),
    ("complex", add_image("x.npy", lambda p: np.save(p, np.ones((2, 2), complex))), ["values of type complex128"]),
    ("pickled", add_image("x.npy", lambda p: np.save(p, np.array([{}]), allow_pickle=True)), ["truncated or damaged"]),
    ("no pixels", add_image("x.npy", lambda p: np.save(p, np.zeros((0, 4)))), ["shape (0, 4)"]),
    (
        "stack",
        add_image("x.npy", lambda p: np.save(p, np.zeros((5, 8, 8)))),
        ["shape (5, 8, 8), not (h, w) or (h, w, 3)"],
    ),
    ("pack itself", add_rows("images.npz,normal"), ["row 42: images.npz: this is a pack: name one of its images"]),
    ("pack too short", add_rows("images.npz#40,normal"), ["row 42: images.npz#40: the pack holds 40 images"]),
    ("no such pack", add_rows("x.npz#0,normal"), ["row 42: x.npz#0: the file does not exist"]),
    (
        "no images",
        add_image("x.npz#0", lambda p: np.savez(p.parent / "x.npz", a=1)),
        ["x.npz#0: the pack has no array"],
    ),
    ("cut pack", cut("images.npz", 0.5), [f"row {i + 2}: images.npz#{i}: the file is truncated" for i in range(40)]),
    # classes and splits
    ("one class", put("manifest.csv", "image,label\nimages.npz#0,normal\n"), ["no image has the label 'abnormal'"]),
    (
        "unknown split",
        columns("split", lambda i: "tets" if i == 4 else THREE[i % 3]),
        ["row 6: unknown split 'tets': did"],
    ),
    (
        "split missing",
        columns("split", lambda i: "" if i == 4 else THREE[i % 3]),
        ["row 6: column 'split' is empty here"],
    ),
    (
        "split without a class",
        columns("split", lambda i: "test" if i < 20 else THREE[i % 3]),
        ["the train split has no image with the label 'normal'", "the validation split has no image with the label 'n"],
    ),
    ("empty split", columns("split", lambda i: THREE[i % 2]), ["the test split has no image"] * 2),
    (
        "patient in two splits",
        columns("patient,split", lambda i: f"p{0 if i == 4 else i},{THREE[i % 3]}"),
        ["row 6: patient p0 is in split validation but in row 2 in split train"],
    ),
    ("patient missing", columns("patient", lambda i: "" if i == 4 else f"p{i}"), ["row 6: column 'patient' is empty"]),
    (
        "same picture with two labels",
        lambda f: (add_rows("copy.npy,abnormal")(f), np.save(f / "copy.npy", np.load(f / "images.npz")["images"][3])),
        ["row 42: copy.npy is the same picture as row 5 with the other label"],
    ),
    (
        "same picture in two splits",
        lambda f: (
            add_rows("copy.npy,normal")(f),
            np.save(f / "copy.npy", np.load(f / "images.npz")["images"][3]),
            columns("split", lambda i: THREE[(i + (i == 40)) % 3])(f),
        ),
        ["row 42: copy.npy is the same picture as row 5 in split train"],
    ),
    (
        "stored splits damaged",
        put("splits.csv", "image,split\na.png,tests\n"),
        ["splits.csv row 2: unknown split: did you"],
    ),
    ("stored splits foreign", put("splits.csv", "hello\n"), ["splits.csv: not the columns image,split"]),
    ("stored splits binary", put("splits.csv", b"\xff\xfe"), ["splits.csv: not UTF-8 text"]),
    # anchor pack
    ("no anchor", remove("anchor"), ["anchor: the folder is missing: copy the whole anchor folder again"]),
    ("no anchor info", remove("anchor/anchor.json"), ["anchor/anchor.json: the file is missing"]),
    ("anchor info damaged", put("anchor/anchor.json", "{"), ["anchor/anchor.json: damaged"]),
    ("anchor info is a list", put("anchor/anchor.json", "[]"), ["anchor/anchor.json: damaged"]),
    ("anchor info mistyped", anchor_info(n="20"), ["anchor/anchor.json: damaged"]),
    ("anchor info incomplete", anchor_info(labels=["on"]), ["anchor/anchor.json: damaged"]),
    ("no anchor images", remove("anchor/anchor.npz"), ["anchor: neither anchor.npz nor anchor.csv is there"]),
    ("anchor cut", cut("anchor/anchor.npz", 0.5), ["anchor/anchor.npz: truncated or damaged"]),
    ("anchor empty", put("anchor/anchor.npz", b""), ["anchor/anchor.npz: truncated or damaged"]),
    (
        "anchor pixel changed",
        changed_anchor,
        ["anchor/anchor.json: its digest differs from that of the pack's content"],
    ),
    ("anchor digest changed", anchor_info(digest="0" * 64), ["anchor/anchor.json: its digest differs"]),
    ("anchor count changed", anchor_info(n=21), ["anchor/anchor.json: says 21 images but the pack holds 20"]),
    (
        "anchor unbalanced",
        anchor_with(labels=np.repeat([0, 1], (8, 12))),
        ["anchor: 8 negative but 12 positive images"],
    ),
    ("anchor one class", anchor_with(labels=np.zeros(20, int)), ["anchor: 20 negative and 0 positive images"]),
    ("anchor third label", anchor_with(labels=np.arange(20) % 3), ["anchor: labels other than 0 and 1"]),
    (
        "anchor labels of another type",
        anchor_with(labels=np.repeat([0.2, 1.0], 10)),
        ["anchor/anchor.npz: the labels are of type float64: store whole numbers, 0 and 1"],
    ),
    ("anchor labels gone", anchor_with(labels=None), ["anchor/anchor.npz: the array 'labels' is missing"]),
    (
        "anchor images gone",
        anchor_with(images=None),
        ["anchor/anchor.npz#0: the pack has no array 'images'"] + [""] * 19,
    ),
    ("anchor images fewer", anchor_with(images=picture(1, (19, 4, 4))), ["anchor/anchor.npz#19: the pack holds 19"]),
    (
        "anchor copies",
        anchor_with(images=np.zeros((20, 4, 4), np.uint8)),
        ["anchor/anchor.npz#1: the same picture"] + [""] * 19,
    ),
    (
        "anchor image absent",
        anchor_table("image,label\nx.png,on\nx.png,off\n"),
        ["anchor/x.png: the file does not"] * 2,
    ),
    (
        "anchor label unknown",
        anchor_table("image,label\nx.png,up\n"),
        ["anchor/anchor.csv row 2: the label is neither"],
    ),
    (
        "anchor path outside",
        anchor_table("image,label\n../x.png,on\n"),
        ["anchor/anchor.csv row 2: '../x.png' leads out"],
    ),
    ("anchor columns", anchor_table("a,b\nx.png,on\n"), ["the column 'image' is", "the column 'label' is"]),
    ("anchor row short", anchor_table("image,label\nx.png\n"), ["anchor/anchor.csv row 2: 1 values for 2 columns"]),
    ("anchor table no CSV", anchor_table('image,label\n"x.png,on\n'), ["anchor/anchor.csv: not a CSV file"]),
    (
        "anchor has primary images",
        anchor_of_primary,
        ["row 2: images.npz#0 is also in", "row 32: images.npz#30 is also"],
    ),
]


@pytest.mark.parametrize(("breaking", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_bad_site_folder(tmp_path: Path, breaking: Breaking, expected: list[str]):
    folder = toy_site(tmp_path / "site", size=8)
    assert check_site(folder, 8) == []
    breaking(folder)
    problems = check_site(folder)
    assert len(problems) == len(expected), problems
    for problem, part in zip(problems, expected, strict=True):
        assert part in problem
        assert "\n" not in problem and str(tmp_path) not in problem, "one line, relative names"
        assert ": " in problem and len(problem) < 400
    with pytest.raises(ProblemList) as caught:  # with the cache of the good folder in place
        load_site(folder, 8)
    assert caught.value.problems == problems


@pytest.mark.parametrize(
    ("options", "part"), [((0,), "image_size 0"), ((-5,), "image_size -5"), ((8, 2), "channels 2")]
)
def test_bad_preprocessing(tmp_path: Path, options, part):
    with pytest.raises(ProblemList, match=part):
        load_site(toy_site(tmp_path / "site", size=8), *options)


def test_site_folder_is_a_file_or_one_level_too_high(tmp_path: Path):
    for name in ("site-b", "site-a"):
        toy_site(tmp_path / "all" / name, size=8)
    assert check_site(tmp_path / "all" / "site-a" / "site.yaml") == [
        "site.yaml: a file, not a site folder: give the folder that holds site.yaml and manifest.csv"
    ]
    assert check_site(tmp_path / "all") == ["all: no site folder itself, but it holds some: give one of site-a, site-b"]
    with pytest.raises(ProblemList, match="give one of site-a, site-b"):
        load_site(tmp_path / "all", 8)


@pytest.mark.parametrize("name", ["x.png", "x.dcm", "x.npz#0", "x.nii.gz"])
def test_read_image_names_the_file(tmp_path: Path, name):
    with pytest.raises(UserError, match=f"^{name}: the file does not exist"):
        read_image(tmp_path / name)
