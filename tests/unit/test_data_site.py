"""site.yaml and manifest.csv, and where a site folder is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_toys import CONFIG
from heterosync.data.site import Row, SiteConfig, find_site_folder, read_manifest, read_site_config
from heterosync.errors import ProblemList, UserError


def config_of(folder: Path, text: str) -> SiteConfig:
    (folder / "site.yaml").write_text(text)
    return read_site_config(folder)


def rows_of(folder: Path, text: str, config: str = CONFIG) -> list[Row]:
    (folder / "manifest.csv").write_text(text)
    return read_manifest(folder, config_of(folder, config))


def test_defaults_and_all_keys(tmp_path: Path):
    assert config_of(tmp_path, CONFIG) == SiteConfig("toy", ("normal", "abnormal"))
    text = CONFIG + (
        "image_column: file\nlabel_column: finding\npatient_column: pid\nsplit_column: part\nwindow: [40, 400.5]\n"
        "device: cuda:1\nbatch_size: 32\nsplit_seed: 7\nthreads: 4\n"
    )
    assert config_of(tmp_path, text) == SiteConfig(
        "toy",
        ("normal", "abnormal"),
        "file",
        "finding",
        "pid",
        "part",
        (40.0, 400.5),
        device="cuda:1",
        batch_size=32,
        split_seed=7,
        threads=4,
    )


def test_labels_stay_text(tmp_path: Path):
    assert config_of(tmp_path, "task: t\nlabels: [no, yes]\n").labels == ("no", "yes")
    assert config_of(tmp_path, "task: t\nlabels: [0, 1]\n").labels == ("0", "1")


def test_empty_optional_key_is_its_default(tmp_path: Path):
    config = config_of(tmp_path, CONFIG + "window:\nbatch_size: null\n")
    assert config.window is None and config.batch_size is None


def test_all_problems_of_the_config_at_once(tmp_path: Path):
    with pytest.raises(ProblemList) as caught:
        config_of(tmp_path, "lables: [a, b]\ndevice: gpu\nbatch_size: 1\nwindow: [40]\nsplit_seed: -1\n")
    text = str(caught.value)
    assert "unknown key 'lables': did you mean 'labels'?" in text
    assert "the key 'task' is missing" in text and "the key 'labels' is missing" in text
    assert "device = 'gpu'" in text and "batch_size = '1'" in text and "window" in text and "split_seed" in text
    assert len(caught.value.problems) == 7


def test_rows(tmp_path: Path):
    rows = rows_of(
        tmp_path,
        "image,label,patient,split,note\n./a.png,normal,p1,train,x\n\nsub\\b.png, abnormal ,p2,test,\n",
    )
    assert rows == [Row(2, "a.png", 0, "p1", "train"), Row(4, "sub/b.png", 1, "p2", "test")]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_separators_and_byte_order_mark(tmp_path: Path, separator, encoding):
    (tmp_path / "site.yaml").write_text(CONFIG)
    text = f"image{separator}label\nä.png{separator}normal\n"
    (tmp_path / "manifest.csv").write_text(text, encoding=encoding)
    assert read_manifest(tmp_path, read_site_config(tmp_path)) == [Row(2, "ä.png", 0, None, None)]


def test_own_column_names(tmp_path: Path):
    config = CONFIG + "image_column: file\nlabel_column: finding\n"
    assert rows_of(tmp_path, "finding,file\nabnormal,x.png\n", config) == [Row(2, "x.png", 1, None, None)]


def test_patient_and_split_columns_of_other_names(tmp_path: Path):
    text = "image,label,PID,Set\na.png,normal,p1,train\nb.png,abnormal,p2,test\n"
    with pytest.raises(ProblemList) as caught:
        rows_of(tmp_path, text)
    assert caught.value.problems == [
        "manifest.csv: is the column 'PID' the patient? set patient_column: PID in site.yaml, or rename the column",
        "manifest.csv: is the column 'Set' the split? set split_column: Set in site.yaml, or rename the column",
    ]
    rows = rows_of(tmp_path, text, CONFIG + "patient_column: PID\nsplit_column: Set\n")
    assert rows == [Row(2, "a.png", 0, "p1", "train"), Row(3, "b.png", 1, "p2", "test")]
    other = "image,label,patient,subject,subset\na.png,normal,p1,x,y\n"  # the right column is there, or nothing near
    assert rows_of(tmp_path, other) == [Row(2, "a.png", 0, "p1", None)]
    config = CONFIG + "label_column: set\n"  # a column that has another role already
    assert rows_of(tmp_path, "image,set\na.png,normal\n", config) == [Row(2, "a.png", 0, None, None)]


def test_every_bad_row_is_named(tmp_path: Path):
    with pytest.raises(ProblemList) as caught:
        rows_of(
            tmp_path,
            "image,label,patient\na.png,sick,p\n/b.png,normal,p\nC:\\c.png,normal,p\n../d.png,normal,p\n"
            ",normal,p\ne.png,normal,p,more\nf.png,normal,\n",
        )
    problems = caught.value.problems
    assert len(problems) == 7
    for line, part in zip(
        (2, 3, 4, 5, 6, 7), ("'sick'", "absolute", "absolute", "leads out", "no image", "4 values"), strict=True
    ):
        assert any(p.startswith(f"manifest.csv row {line}: ") and part in p for p in problems), (line, part)
    assert any("row 8: column 'patient' is empty" in p for p in problems)


def test_site_folder_order(tmp_path: Path):
    for name in ("configured", "data/site-a", "data/site-b"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data/site-b/site.yaml").write_text(CONFIG)
    environ = {"HETEROSYNC_DATA": str(tmp_path / "data")}
    assert find_site_folder("site-a", str(tmp_path / "configured"), environ) == tmp_path / "configured"
    assert find_site_folder("site-a", None, environ) == tmp_path / "data/site-a"
    assert find_site_folder("any", None, {"HETEROSYNC_DATA": str(tmp_path / "data/site-b")}) == tmp_path / "data/site-b"
    with pytest.raises(UserError, match="did you mean 'site-b'"):
        find_site_folder("site-bb", None, environ)
    with pytest.raises(UserError, match="set HETEROSYNC_DATA"):
        find_site_folder("site-a", None, {})
    with pytest.raises(UserError, match="data_root of local/privacy.json does not exist"):
        find_site_folder("site-a", str(tmp_path / "gone"), environ)
    with pytest.raises(UserError, match="give an absolute path"):
        find_site_folder("site-a", "data", environ)
    with pytest.raises(UserError, match="not a site name"):
        find_site_folder("../site-a", None, environ)
