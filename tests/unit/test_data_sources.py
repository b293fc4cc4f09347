"""Public image sets in the exact layout in which they are published, and the table of all kinds of sources."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR10

from data_toys import picture, save_png, write_dicom
from heterosync.cli.source import SOURCE_KINDS
from heterosync.data.check import check_site
from heterosync.data.scenario import write_scenario
from heterosync.data.scenario_tables import SiteRow
from heterosync.data.sources import SOURCES, open_collection
from heterosync.errors import ProblemList, UserError

CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def mura(root: Path) -> Path:
    """`MURA-v1.1` with both parts, a patient with two body parts and two studies, and what the archive has besides."""
    files = [
        "train/XR_SHOULDER/patient00001/study1_positive/image1.png",
        "train/XR_SHOULDER/patient00001/study1_positive/image2.png",
        "train/XR_SHOULDER/patient00001/study2_negative/image1.png",
        "train/XR_HAND/patient00001/study1_negative/image1.png",
        "train/XR_HAND/patient00002/study1_negative/image1.png",
        "valid/XR_HAND/patient11185/study1_positive/image1.png",
    ]
    for number, name in enumerate(files):
        save_png(root / name, picture(number))
    (root / "train/XR_HAND/patient00002/study1_negative/._image1.png").write_bytes(b"resource fork")
    (root / "train_image_paths.csv").write_text("MURA-v1.1/" + files[0] + "\n")
    (root / "train_labeled_studies.csv").write_text("MURA-v1.1/train/XR_SHOULDER/patient00001/study1_positive/,1\n")
    return root


def rsna(root: Path) -> Path:
    """The challenge's folder: a row per box, so one patient may have several rows."""
    classes = {"a1": "Normal", "b2": "Lung Opacity", "c3": "No Lung Opacity / Not Normal", "d4": "Normal"}
    rows = ["a1", "b2", "b2", "c3", "d4"]
    root.mkdir()
    (root / "stage_2_detailed_class_info.csv").write_text(
        "patientId,class\n" + "".join(f"{name},{classes[name]}\n" for name in rows)
    )
    boxes = "".join(
        f"{name},{'10.0,20.0,30.0,40.0,1' if classes[name] == 'Lung Opacity' else ',,,,0'}\n" for name in rows
    )
    (root / "stage_2_train_labels.csv").write_text("patientId,x,y,width,height,Target\n" + boxes)
    for number, name in enumerate(classes):
        write_dicom(root / "stage_2_train_images" / f"{name}.dcm", picture(number))
    return root


def bus_bra(root: Path) -> Path:
    rows = [
        ("bus_0001-l", 1, "benign", "GE Logiq 5"),
        ("bus_0002-l", 2, "malignant", "GE Logiq 5"),
        ("bus_0002-r", 2, "malignant", "GE Logiq 5"),
        ("bus_0003-s", 3, "benign", "GE Logiq 7"),
    ]
    table = ["ID,Case,Histology,Pathology,BIRADS,Device,Width,Height,Side,BBOX"]
    for number, (name, case, pathology, device) in enumerate(rows):
        table.append(f'{name},{case},Cyst,{pathology},2,{device},10,12,left,"[1,2,3,4]"')
        save_png(root / "Images" / f"{name}.png", picture(number))
        save_png(root / "Masks" / f"{name.replace('bus', 'mask')}.png", picture(50 + number))
    (root / "bus_data.csv").write_text("\n".join(table) + "\n")
    return root


def cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Batches of four images; torchvision's checksums are set to those of these files."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name: str, seed: int) -> list[str]:
        data = np.random.default_rng(seed).integers(0, 256, (4, 3072), dtype=np.uint8)
        return write(name, {"data": data, "labels": [0, 1, 2, 1], "batch_label": name, "filenames": list("abcd")})

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}", i) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 9)])
    _, md5 = write("batches.meta", {"label_names": CIFAR_CLASSES, "num_vis": 3072})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": md5})
    return root


def medmnist(file: Path, colour: bool = False) -> Path:
    shape, parts = (28, 28, 3) if colour else (28, 28), {}
    for seed, (part, n) in enumerate((("train", 6), ("val", 2), ("test", 4))):
        parts[f"{part}_images"] = picture(seed, (n, *shape))
        parts[f"{part}_labels"] = (np.arange(n) % 3 if colour else np.arange(n) % 2).astype(np.uint8)[:, None]
    np.savez_compressed(file, **parts)
    return file


def test_mura(tmp_path: Path) -> None:
    found = open_collection(mura(tmp_path / "MURA-v1.1"), kind="mura")
    assert found.classes == ("negative", "positive") and found.counts() == (3, 3)
    assert found.domains == ["hand", "hand", "shoulder", "shoulder", "shoulder", "hand"]
    assert found.patients == ["patient00001", "patient00002", *["patient00001"] * 3, "patient11185"]
    assert found.ids[2] == "train/XR_SHOULDER/patient00001/study1_positive/image1.png" and found.labels[2] == 1
    assert (found.image(2) == picture(0)).all()
    assert len(open_collection(tmp_path / "MURA-v1.1" / "train", kind="mura")) == 5
    assert open_collection(tmp_path / "MURA-v1.1/train/XR_SHOULDER", kind="mura").domains == ["shoulder"] * 3
    unlabelled = tmp_path / "MURA-v1.1/valid/XR_HAND/patient11186/study1/image1.png"
    save_png(unlabelled, picture(40))
    found = open_collection(tmp_path / "MURA-v1.1", kind="mura")
    assert found.notes == ("1 images left out: their study's folder names no label",) and len(found) == 6


def test_rsna(tmp_path: Path) -> None:
    found = open_collection(rsna(tmp_path / "rsna"), kind="rsna")
    assert found.classes == ("Normal", "Lung Opacity") and found.labels.tolist() == [0, 1, 0]
    assert found.patients == ["a1", "b2", "d4"] and (found.image(1) == write_and_read(tmp_path, 1)).all()
    assert found.notes == ("1 images left out: label 'No Lung Opacity / Not Normal'",)
    other = open_collection(tmp_path / "rsna", positive="No Lung Opacity / Not Normal", kind="rsna")
    assert other.patients == ["a1", "c3", "d4"]


def write_and_read(folder: Path, seed: int) -> np.ndarray:
    """What the DICOM reader makes of the same pixels in a file of its own."""
    from heterosync.data.dicom import read_dicom

    return read_dicom(write_dicom(folder / "one.dcm", picture(seed)))


def test_bus_bra(tmp_path: Path) -> None:
    found = open_collection(bus_bra(tmp_path / "BUSBRA"), kind="bus-bra")
    assert found.labels.tolist() == [0, 1, 1, 0] and found.patients == ["1", "2", "2", "3"]
    assert found.domains == ["GE Logiq 5"] * 3 + ["GE Logiq 7"]
    assert found.ids[2] == "Images/bus_0002-r.png" and (found.image(2) == picture(2)).all()


def test_cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = cifar10(tmp_path / "cifar", monkeypatch)
    found = open_collection(root, kind="cifar10")
    assert found.classes == ("airplane", "automobile") and found.counts() == (6, 12) and found.patients is None
    assert found.ids[:3] == ["train/0", "train/1", "train/3"] and found.ids[-1] == "test/3"
    raw = np.random.default_rng(1).integers(0, 256, (4, 3072), dtype=np.uint8)[1]
    assert found.pixels is not None and (found.pixels[1] == raw.reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert found.notes == ("6 images left out: label 'bird'",)
    other = open_collection(root / "cifar-10-batches-py", "bird", "airplane", kind="cifar10")
    assert other.counts() == (6, 6)
    (root / "cifar-10-batches-py" / "data_batch_3").write_bytes(b"cut")
    with pytest.raises(UserError, match="incomplete or damaged: unpack"):
        open_collection(root, kind="cifar10")


def test_medmnist(tmp_path: Path) -> None:
    found = open_collection(medmnist(tmp_path / "pneumoniamnist.npz"), "0", "1", kind="medmnist")
    assert found.counts() == (6, 6) and found.pixels is not None and found.pixels.shape == (12, 28, 28)
    colour = open_collection(medmnist(tmp_path / "bloodmnist.npz", colour=True), "0", "2")
    assert colour.counts() == (5, 3) and colour.notes == ("4 images left out: label '1'",)
    multi = {f"{part}_images": picture(1, (2, 28, 28)) for part in ("train", "val", "test")}
    np.savez(tmp_path / "chestmnist.npz", **multi, **{k.replace("images", "labels"): np.eye(2, 14) for k in multi})
    with pytest.raises(UserError, match="one label per image is needed"):
        open_collection(tmp_path / "chestmnist.npz", "0", "1")


def test_a_patient_of_mura_is_in_one_site_and_one_split(tmp_path: Path) -> None:
    """From the published folders to site folders: three images per patient, checked like any site."""
    for number in range(60):
        study = f"study1_{('negative', 'positive')[number // 3 % 2]}"
        name = f"train/XR_WRIST/patient{number // 3:05d}/{study}/image{number % 3 + 1}.png"
        save_png(tmp_path / "MURA-v1.1" / name, picture(number))
    collection = open_collection(tmp_path / "MURA-v1.1", kind="mura")
    write_scenario(collection, [SiteRow("a", "wrist", 12, 12), SiteRow("b", "wrist", 12, 12)], tmp_path / "out")
    assert check_site(tmp_path / "out" / "a", need_anchor=False) == []
    lines = [(tmp_path / "out" / site / "manifest.csv").read_text().splitlines()[1:] for site in "ab"]
    patients = [{line.split(",")[2] for line in site} for site in lines]
    assert len(patients[0]) == len(patients[1]) == 8 and not patients[0] & patients[1]


def test_help_names_every_kind() -> None:
    assert SOURCE_KINDS.split(", ") == list(SOURCES)


@pytest.mark.parametrize(
    ("kind", "breaking", "message"),
    [
        ("mura", lambda root: (root / "x").mkdir(parents=True), "holds no folder XR_…: give the folder MURA-v1.1"),
        ("mura", lambda root: (root / "XR_HAND/patient1").mkdir(parents=True), "no image lies in XR_"),
        ("rsna", lambda root: root.mkdir(), "stage_2_detailed_class_info.csv is missing: give the folder that holds"),
        (
            "rsna",
            lambda root: (rsna(root) / "stage_2_detailed_class_info.csv").write_text("id,class\na1,Normal\n"),
            "no column 'patientId'",
        ),
        (
            "rsna",
            lambda root: (rsna(root) / "stage_2_detailed_class_info.csv").write_text(
                "patientId,class\na1,Normal\nb2,Lung Opacity\na1,Lung Opacity\n"
            ),
            "line 4: a1 is 'Lung Opacity' here but 'Normal' above",
        ),
        ("rsna", lambda root: (rsna(root) / "stage_2_train_images" / "b2.dcm").unlink(), "b2.dcm does not exist"),
        ("bus-bra", lambda root: (bus_bra(root) / "Images" / "bus_0003-s.png").unlink(), "bus_0003-s.png does not"),
        (
            "bus-bra",
            lambda root: (bus_bra(root) / "bus_data.csv").write_text("ID,Case,Pathology\nbus_0001-l,,benign\n"),
            "line 2: the columns ID and Case must be filled",
        ),
        (
            "bus-bra",
            lambda root: (bus_bra(root) / "bus_data.csv").write_text("ID,Case,Pathology\nbus_0001-l,1,benign\n"),
            "no image has the label 'malignant'",
        ),
        ("cifar10", lambda root: root.mkdir(), "holds no folder cifar-10-batches-py: unpack"),
        ("cifar10", lambda root: (root / "cifar-10-batches-py").mkdir(parents=True), "incomplete or damaged"),
        ("npz", lambda root: root.mkdir(), "is a folder, but npz is a .npz file"),
        ("murra", lambda root: root.mkdir(), "no kind of source is named 'murra'; did you mean 'mura'"),
        ("folder", lambda root: root.mkdir(), "name the labels of the two classes with --negative and --positive"),
    ],
)
def test_what_is_not_in_its_layout(tmp_path: Path, kind: str, breaking, message: str) -> None:
    breaking(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        open_collection(tmp_path / "set", kind=kind)


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    root = bus_bra(tmp_path / "BUSBRA")
    for path in (root / "Images").iterdir():
        path.unlink()
    with pytest.raises(ProblemList) as caught:
        open_collection(root, kind="bus-bra")
    assert len(caught.value.problems) == 4
    with pytest.raises(UserError, match="is not a folder, as mura is"):
        open_collection(root / "bus_data.csv", kind="mura")
    with pytest.raises(UserError, match="leave out --patient-column"):
        open_collection(root, kind="bus-bra", patient_column="Case")
