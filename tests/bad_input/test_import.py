"""What people get wrong when they import data: one clear line each, nothing written."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heterosync.cli.base import run_command
from heterosync.cli.data import register
from heterosync.data.importers import from_csv, from_folder, from_npz
from heterosync.data.scenario_tables import read_table
from heterosync.data.sources import open_collection
from heterosync.errors import ProblemList, UserError


def heterosync(*words: object) -> int:
    parser = argparse.ArgumentParser(prog="heterosync")
    register(parser.add_subparsers(required=True))
    return run_command(parser, [str(word) for word in words])


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    for i in range(8):
        path = tmp_path / "scans" / ("normal", "abnormal")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (9, 9), dtype=np.uint8)).save(path)
    return tmp_path / "scans"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv: the file is empty"),
        ("image,label\n", "no row below the header"),
        ("picture,label\na.png,n\n", "no column or key 'image'"),
        ("image,lable\na.png,n\n", "no column or key 'label'; did you mean 'lable'"),
        ("image,label\nnormal/0.png,n,extra\n", "line 2: 3 values for 2 columns"),
        ("image,label\nnormal/0.png\n", "line 2: 1 values for 2 columns"),
        ("image,label,label\nnormal/0.png,n,p\n", "the column 'label' stands there twice"),
        ('image,label\n"normal/0.png,n\n', "t.csv: not a CSV file"),
        ("image,label\nnormal/0.png,n\n", "no image has the label 'p'"),
        ("image,label\nnormal/0.png,n\nnormal/99.png,p\n", "line 3: .*99.png does not exist"),
        ("image,label\nnormal/0.png,n\nnormal/0.png,p\n", "line 3: normal/0.png stands in line 2 already"),
        ("image,label\n,n\nnormal/0.png,p\n", "line 2: the column 'image' is empty"),
        ("image,label,patient\nnormal/0.png,n,\nnormal/2.png,p,7\n", "line 2: the column 'patient' is empty"),
        ("image,label\npack.npz#0,n\nnormal/2.png,p\n", "pack.npz does not exist"),
    ],
)
def test_tables(scans: Path, text: str, message: str) -> None:
    (scans / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        from_csv(scans / "t.csv", "n", "p")


def test_all_bad_rows_and_all_bad_files_are_named_at_once(scans: Path) -> None:
    (scans / "t.csv").write_text("image,label\nx.png,n\ny.png,p\nz.png,n\n")
    with pytest.raises(ProblemList) as caught:
        from_csv(scans / "t.csv", "n", "p")
    assert len(caught.value.problems) == 3
    for i in (0, 3):
        (scans / ("normal", "abnormal")[i % 2] / f"{i}.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(ProblemList) as caught:
        from_folder(scans, "normal", "abnormal")
    assert len(caught.value.problems) == 2 and all("damaged" in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [0, 1]}, "no column or key 'images'"),
        ({"images": np.zeros((2, 4, 4), np.uint8)}, "no column or key 'labels'"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0]}, r"2 images but labels of shape \(1,\)"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.eye(2, dtype=int)}, "one label per image"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0.5, 1.0]}, "labels are of type float64"),
        ({"images": np.zeros((2, 4), np.uint8), "labels": [0, 1]}, r"needed: \(n, h, w\)"),
        ({"images": np.full((2, 4, 4), np.nan), "labels": [0, 1]}, "image 0: .*NaN"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, 1]}, "no image is left"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, 0]}, "no image has the label '1'"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": [0, 1], "names": ["a"]}, "'names' has 1 entries for 2"),
        ({"images": np.array([{}, {}]), "labels": [0, 1]}, "not a readable .npz"),
    ],
)
def test_npz_files(tmp_path: Path, arrays: dict, message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        from_npz(tmp_path / "a.npz", "0", "1")


def test_sources(scans: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    (tmp_path / "notes.txt").write_text("?")
    for source, message in [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "cut.npz", "not a readable .npz"),
        (tmp_path / "notes.txt", "neither a folder nor a .csv or .npz"),
    ]:
        with pytest.raises(UserError, match=message):
            open_collection(source, "n", "p")
    with pytest.raises(UserError, match="no sub-folder is named 'norml', .* did you mean 'normal'"):
        from_folder(scans, "norml", "abnormal")
    with pytest.raises(UserError, match="name two classes"):
        from_folder(scans, "normal", "normal")
    with pytest.raises(UserError, match="leave out --label-column"):
        open_collection(scans, "normal", "abnormal", label_column="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv: the file is empty"),
        ("site,domain,pos,neg\n", "header must be site,domain,negative,positive .domain may be left out."),
        ("site,domain,negative,positive\n", "has no rows"),
        ("site,domain,negative,positive\na,x,1\n", "line 2: 3 values for 4 columns"),
        ("site,domain,negative,positive\n../a,x,1,1\n", "line 2: site name '../a'"),
        ("site,domain,negative,positive\n# fine\n\n../a,,1,1\n", "line 4: site name '../a'"),
        ("site,domain,negative,positive\na,x,-1,1\n", "line 2: counts '-1' and '1' must be whole numbers"),
        ("site,domain,negative,positive\na,x,0,0\n", "line 2: counts"),
        ("site,domain,negative,positive\na,x,1,1\na,x,2,2\n", "site 'a' has domain 'x' twice"),
        ("site,negative,positive\na,1,1\na,2,2\n", "site 'a' has domain '.' twice"),
        ("level,site,negative,positive\n2,a,1,1\n2,a,2,2\n", "site 'a' has domain '.' twice at level 2"),
        ("level,site,negative,positive\n2,a,1,1\n,a,2,2\n", "line 3: the column 'level' is empty"),
        ("site,negative,positive,test_negative\na,9,9,3\n", "test_negative with test_positive"),
        ("site,negative,positive,test_negative,test_positive\na,9,9,3,\n", "line 2: test sizes '3' and ''"),
        ("site,negative,positive,test_negative,test_positive\na,9,9,8,3\n", "line 2: 8 test images of 9 leave none"),
        (
            "site,domain,negative,positive,test_negative,test_positive\na,x,9,9,3,3\na,y,9,9,,\n",
            "site 'a' has test sizes in some rows only",
        ),
        ("site,negative,positive,draw\na,1,1,sharde\n", "line 2: draw 'sharde' is unknown; did you mean 'shared'"),
        ("site,negative,positive,draw\na,1,1,shared\nb,1,1,\n", "some rows are shared and some disjoint"),
        ("site,negative,positive,draw\nunseen,1,1,shared\n", "'unseen' cannot share images"),
    ],
)
def test_scenario_tables(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "t.csv")


def test_unknown_table() -> None:
    with pytest.raises(
        UserError, match="'combind' is neither a CSV file nor a scenario table; did you mean 'combined'"
    ):
        read_table("combind")


def test_commands_end_with_one_line_and_leave_nothing(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ("--negative", "normal", "--positive", "abnormal")
    (tmp_path / "t.csv").write_text("site,domain,negative,positive\na,*,9,1\n")
    for words, message in [
        (("import", "npz", scans, *classes, "--out", tmp_path / "o"), "write `heterosync data import folder`"),
        (("import", "folder", scans, *classes, "--anchor", tmp_path, "--out", tmp_path / "o"), "anchor.json"),
        (("anchor", scans, *classes, "--per-class", 5, "--out", tmp_path / "o"), "short by 1"),
        (("scenario", tmp_path / "t.csv", scans, *classes, "--out", tmp_path / "o"), "short by 5"),
        (("scenario", tmp_path / "t.csv", scans, *classes, "--scale", "nan", "--out", tmp_path / "o"), "scale must be"),
        (("synthetic", "--out", scans, "--scale", 0.1), "not empty"),
        (("synthetic", "--out", tmp_path / "o", "--image-size", 4), "image size must be"),
    ]:
        assert heterosync("data", *words) == 1
        errors = capsys.readouterr().err.splitlines()
        assert message in errors[0] and len(errors) <= 2 and errors[0].startswith("heterosync: ")
        assert not (tmp_path / "o").exists()
    assert heterosync("data", "anchor", scans, *classes, "--seed", "-1", "--out", tmp_path / "o") == 2


def test_all_damaged_images_are_named_with_their_folders(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("normal/0.png", "abnormal/1.png"):
        (scans / name).write_bytes(b"\x89PNG broken")
    (scans / "t.csv").write_text("".join(f"{line}\n" for line in ("image,label", "normal/0.png,n", "abnormal/1.png,p")))
    np.savez(tmp_path / "a.npz", images=np.full((3, 4, 4), np.nan), labels=[0, 1, 1])
    (tmp_path / "p.csv").write_text("image,label\npack.npz#7,n\npack.npz#0,n\npack.npz#9,p\n")
    np.savez(tmp_path / "pack.npz", images=np.zeros((2, 4, 4), np.uint8))
    for kind, source, classes, names in [
        ("folder", scans, ("normal", "abnormal"), ["abnormal/1.png: the file is", "normal/0.png: the file is"]),
        ("csv", scans / "t.csv", ("n", "p"), ["normal/0.png: the file is", "abnormal/1.png: the file is"]),
        ("npz", tmp_path / "a.npz", ("0", "1"), [f"a.npz image {row}: the picture has NaN" for row in range(3)]),
        ("csv", tmp_path / "p.csv", ("n", "p"), ["pack.npz#7: the pack holds 2", "pack.npz#9: the pack holds 2"]),
    ]:
        words = ("import", kind, source, "--negative", classes[0], "--positive", classes[1], "--out", tmp_path / "o")
        assert heterosync("data", *words) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(names)
        assert all(name in line for name, line in zip(names, lines, strict=True)), lines
        assert not (tmp_path / "o").exists()


def test_a_site_without_an_anchor_pack_is_told_so(
    scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = ("--negative", "normal", "--positive", "abnormal")
    (tmp_path / "t.csv").write_text("site,negative,positive\na,3,3\n")
    for i in range(8, 12):  # for the anchor pack, which must share no image
        path = tmp_path / "public" / ("normal", "abnormal")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 9), i * 10, np.uint8)).save(path)
    assert (
        heterosync("data", "anchor", tmp_path / "public", *classes, "--per-class", 2, "--out", tmp_path / "pack") == 0
    )
    for words, site in [
        (("import", "folder"), tmp_path / "o"),
        (("scenario", tmp_path / "t.csv"), tmp_path / "o/SITE"),
    ]:
        for anchor in ((), ("--anchor", tmp_path / "pack")):
            capsys.readouterr()
            assert heterosync("data", *words, scans, *classes, *anchor, "--out", tmp_path / "o") == 0
            last = capsys.readouterr().out.splitlines()[-1]
            assert (f"copy it to {site}/anchor" in last and "heterosync data anchor" in last) == (not anchor)
            shutil.rmtree(tmp_path / "o")


def test_check_prints_five_of_a_kind_or_all(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = ("--negative", "normal", "--positive", "abnormal")
    assert heterosync("data", "import", "folder", scans, *classes, "--out", tmp_path / "site") == 0
    for path in (tmp_path / "site" / "images").iterdir():
        path.unlink()
    capsys.readouterr()
    assert heterosync("data", "check", tmp_path / "site", "--no-anchor") == 1
    *shown, more, last = capsys.readouterr().out.splitlines()
    assert len(shown) == 5 and more == "… and 3 more of this kind, rows 7 to 9"
    assert last.endswith("site: 8 problems (--all prints each of them)")
    assert heterosync("data", "check", tmp_path / "site", "--no-anchor", "--all") == 1
    assert len(capsys.readouterr().out.splitlines()) == 9


def test_import_then_check(scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = ("--negative", "normal", "--positive", "abnormal")
    for i in range(8, 20):
        Image.fromarray(np.full((9, 9), i * 10, np.uint8)).save(scans / ("normal", "abnormal")[i % 2] / f"{i}.png")
    assert heterosync("data", "anchor", scans, *classes, "--per-class", 2, "--out", tmp_path / "anchor") == 0
    assert heterosync("data", "import", "folder", scans, *classes, "--out", tmp_path / "site") == 0
    assert heterosync("data", "check", tmp_path / "site", "--no-anchor") == 0
    out = capsys.readouterr().out
    assert "scans: 20 images, 10 normal, 10 abnormal" in out
    assert "train       6 normal, 6 abnormal" in out and "test        3 normal, 3 abnormal" in out
    assert heterosync("data", "check", tmp_path / "site") == 1
    assert "anchor: the folder is missing" in capsys.readouterr().out
