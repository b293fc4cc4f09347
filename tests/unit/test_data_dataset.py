"""A whole site folder, loaded for training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import heterosync.data.dataset as dataset
from data_toys import png_site, write_manifest
from heterosync.data.anchor import anchor_digest
from heterosync.data.dataset import SPLITS, load_site
from heterosync.data.decoding import Decoding
from heterosync.data.readers import read_image, to_size
from heterosync.errors import ProblemList, UserError
from toys import toy_site


def test_toy_site(tmp_path: Path):
    folder = toy_site(tmp_path / "site", (20, 10))
    data = load_site(folder, 32)
    assert data.labels == ("normal", "abnormal") and data.config.device == "cpu"
    assert len(data.primary) == 30 and len(data.anchor) == 20
    assert {name: len(rows) for name, rows in data.splits.items()} == {"train": 18, "validation": 3, "test": 9}
    assert data.anchor_digest == anchor_digest(folder / "anchor")
    assert data.primary.ids[12] == "images.npz#12"


def test_batch_is_float_in_unit_range_and_equals_decoding(tmp_path: Path):
    folder = toy_site(tmp_path / "site")
    for _ in range(2):  # decoded, then from the cache
        data = load_site(folder, 16, 3)
        batch = data.primary.batch(np.array([7, 3, 30]))
        expected = np.stack([to_size(read_image(f"{folder}/images.npz#{row}"), 16, 3) for row in (7, 3, 30)])
        assert batch.dtype == torch.float32 and batch.shape == (3, 3, 16, 16)
        assert torch.equal(batch, torch.from_numpy(expected).float() / 255)
    assert torch.equal(data.primary.batch(torch.tensor([7, 3, 30])), batch)
    batch.zero_()
    assert data.primary.pixels[7].any(), "a batch is a copy"


def test_subset(tmp_path: Path):
    primary = load_site(toy_site(tmp_path / "site"), 16).primary
    part = primary.subset([5, 30])
    assert part.ids == ["images.npz#5", "images.npz#30"] and part.labels.tolist() == [0, 1]
    assert torch.equal(part.batch([0, 1]), primary.batch([5, 30]))


def test_split_is_kept(tmp_path: Path):
    folder = toy_site(tmp_path / "site")
    first = load_site(folder, 16).splits
    (folder / "site.yaml").write_text((folder / "site.yaml").read_text() + "split_seed: 5\n")
    again = load_site(folder, 16).splits
    assert all((first[name] == again[name]).all() for name in SPLITS), "a drawn split outlives a changed seed"
    (folder / "splits.csv").unlink()
    assert any((first[name] != rows).any() for name, rows in load_site(folder, 16).splits.items())


def test_same_split_in_every_copy_of_a_folder(tmp_path: Path):
    one, two = (load_site(toy_site(tmp_path / name), 16).splits for name in ("one", "two"))
    assert all((one[name] == two[name]).all() for name in SPLITS)


def test_split_column(tmp_path: Path):
    rows = png_site(tmp_path, (6, 6))
    named = [[*row, SPLITS[i % 3]] for i, row in enumerate(rows)]
    write_manifest(tmp_path, named, ("image", "label", "split"))
    data = load_site(tmp_path, 12, need_anchor=False)
    assert data.splits["test"].tolist() == [2, 5, 8, 11] and not (tmp_path / "splits.csv").exists()
    assert data.anchor is None and data.anchor_digest is None


def test_patients_stay_together(tmp_path: Path):
    rows = png_site(tmp_path, (20, 20))
    write_manifest(tmp_path, [[*row, f"p{i // 2}"] for i, row in enumerate(rows)], ("image", "label", "patient"))
    splits = load_site(tmp_path, 12, need_anchor=False).splits
    held = [{row // 2 for row in rows} for rows in splits.values()]
    assert sum(map(len, held)) == 20


def test_outside_test_set_needs_no_other_split(tmp_path: Path):
    rows = png_site(tmp_path, (2, 1))
    write_manifest(tmp_path, [[*row, "test"] for row in rows], ("image", "label", "split"))
    splits = load_site(tmp_path, 12, need_anchor=False).splits
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 0, "validation": 0, "test": 3}


def test_all_problems_are_raised_at_once(tmp_path: Path):
    rows = png_site(tmp_path)
    (tmp_path / rows[0][0]).write_bytes(b"")
    (tmp_path / rows[5][0]).unlink()
    with pytest.raises(ProblemList) as caught:
        load_site(tmp_path, 12)
    assert len(caught.value.problems) == 3  # two images, no anchor


def read_only(monkeypatch, *folders: Path) -> None:
    """`folders` refuse to be written, for the superuser as well."""
    original = dataset.write_splits

    def write(folder, *rest):
        if folder in folders:
            raise UserError("cannot write") from PermissionError(13, "Permission denied")
        original(folder, *rest)

    monkeypatch.setattr(dataset, "write_splits", write)


def test_read_only_site_folder_keeps_its_splits_in_the_cache(tmp_path: Path, monkeypatch):
    folder = toy_site(tmp_path / "site")
    monkeypatch.setenv("HETEROSYNC_CACHE", str(tmp_path / "cache"))
    read_only(monkeypatch, folder)
    first = load_site(folder, 16).splits
    assert [path.name for path in tmp_path.glob("cache/*/splits.csv")] == ["splits.csv"]
    assert not (folder / "splits.csv").exists() and not (folder / ".heterosync").exists()
    assert all((first[name] == load_site(folder, 16).splits[name]).all() for name in SPLITS)


def test_nothing_writable_at_all(tmp_path: Path, monkeypatch):
    folder = toy_site(tmp_path / "site")
    expected = load_site(toy_site(tmp_path / "other"), 16)
    monkeypatch.setattr("heterosync.data.check.cache_root", lambda *_: None)
    monkeypatch.setattr(dataset, "cache_root", lambda *_: None)
    read_only(monkeypatch, folder)
    data = load_site(folder, 16)
    assert all((data.splits[name] == expected.splits[name]).all() for name in SPLITS)
    assert (data.primary.pixels == expected.primary.pixels).all()
    assert sorted(path.name for path in folder.iterdir()) == ["anchor", "images.npz", "manifest.csv", "site.yaml"]


def test_second_load_decodes_nothing(tmp_path: Path, monkeypatch):
    folder = toy_site(tmp_path / "site")
    load_site(folder, 16)
    monkeypatch.setattr(Decoding, "_read", lambda *_: pytest.fail("decoded again"))
    load_site(folder, 16)
