"""Prepared cases: from the cache what is prepared without it, prepared again when a file changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from heterosync.data.volume_dataset import VolumeSite, load_volume_site
from heterosync.data.volume_preprocess import Preprocessing
from heterosync.errors import ProblemList, UserError
from volume_toys import oblique, organ, save_nifti, save_series, scan, volume_site, write_rows


def cached(folder: Path) -> list[Path]:
    return sorted((folder / ".heterosync/cache/volumes").rglob("*.pt"))


def prepared_count(site: VolumeSite, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    real = VolumeSite._prepare
    monkeypatch.setattr(VolumeSite, "_prepare", lambda self, number: (made.append(number), real(self, number))[1])
    return made


def test_a_case_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volume_site(tmp_path)
    site = load_volume_site(tmp_path)
    made = prepared_count(site, monkeypatch)
    first = site[2]
    again = load_volume_site(tmp_path)[2]
    assert made == [2] and len(cached(tmp_path)) == 1
    for name in ("image", "mask", "affine"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert first.id == "images/2.nii.gz" and first.image.dtype == torch.float32 and first.mask.dtype == torch.uint8
    assert first.image.shape == first.mask.shape == (1, *site.geometry(2).resampled_shape(1.0))
    np.testing.assert_array_equal(site.organ(2), organ() == 1)
    site.prepare()
    assert made == [2, 0, 1, 3, 4, 5, 6]


def test_the_cache_follows_files_and_settings(tmp_path: Path) -> None:
    volume_site(tmp_path)
    site = load_volume_site(tmp_path)
    before, other = site[1], site[4]
    save_nifti(tmp_path / "images/1.nii.gz", scan(77))
    site = load_volume_site(tmp_path)
    assert not torch.equal(site[1].image, before.image) and torch.equal(site[4].image, other.image)
    assert len(cached(tmp_path)) == 2, "what the folder no longer has is dropped"
    coarse = load_volume_site(tmp_path, Preprocessing(spacing=1.5))
    assert coarse[4].image.numel() < other.image.numel() / 2
    for number in (4, 1):
        whole = site[number].image.clone()
        path = site._path(number)
        assert path is not None and path in cached(tmp_path)
        for damaged in (b"junk", path.read_bytes()[:500]):
            path.unlink(missing_ok=True)  # never write into a file that is mapped
            path.write_bytes(damaged)
            assert torch.equal(site[number].image, whole)
        assert torch.equal(site[number].image, whole) and path.exists()


def test_a_dicom_series_is_prepared_as_the_same_nifti(tmp_path: Path) -> None:
    rows = volume_site(tmp_path)
    affine = oblique(axes="LPS")
    save_nifti(tmp_path / rows[0][0], scan(50), affine)
    save_nifti(tmp_path / rows[0][1], organ(), affine)
    from_nifti = load_volume_site(tmp_path)[0]
    save_series(tmp_path / "images/series", scan(50), affine)
    rows[0][0] = "images/series"
    write_rows(tmp_path, rows)
    site = load_volume_site(tmp_path)
    from_series = site[0]
    assert site.facts[0].orientation == "LPS" and from_series.id == "images/series"
    assert torch.equal(from_series.mask, from_nifti.mask)
    assert (from_series.image - from_nifti.image).abs().max() < 1e-4
    (tmp_path / "images/series/002.dcm").unlink()
    with pytest.raises(ProblemList, match="row 2: images/series: a slice is missing"):
        load_volume_site(tmp_path)


def test_too_fine_a_spacing_is_told_before_it_is_tried(tmp_path: Path) -> None:
    volume_site(tmp_path)
    wide = np.zeros((100, 100, 40), np.uint8)
    wide[40:60, 40:60, 10:30] = 1
    for name, values in (("images", scan(1, wide.shape)), ("masks", wide)):
        save_nifti(tmp_path / f"{name}/0.nii.gz", values, oblique(shape=wide.shape))
    site = load_volume_site(tmp_path, Preprocessing(spacing=0.1))
    with pytest.raises(UserError, match="images/0.nii.gz: 1387 x 1387 x 1171 voxels at 0.1 mm, 8.39 GiB"):
        site[0]


def test_a_cache_of_its_own(tmp_path: Path) -> None:
    volume_site(tmp_path / "site")
    load_volume_site(tmp_path / "site", cache=tmp_path / "cache")[0]
    assert not (tmp_path / "site/.heterosync").exists()
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 1 and (tmp_path / "site/folds.csv").exists()


def test_problems_are_raised_together_and_nothing_is_drawn(tmp_path: Path) -> None:
    volume_site(tmp_path)
    for number in (0, 3):
        save_nifti(tmp_path / f"masks/{number}.nii.gz", 0 * organ())
    with pytest.raises(ProblemList) as caught:
        load_volume_site(tmp_path)
    assert len(caught.value.problems) == 2 and not (tmp_path / "folds.csv").exists()


def test_an_organ_that_vanishes_at_a_coarse_spacing_is_told(tmp_path: Path) -> None:
    volume_site(tmp_path)
    tiny = 0 * organ()
    tiny[6, 5, 3] = 1
    save_nifti(tmp_path / "masks/0.nii.gz", tiny)
    with pytest.raises(UserError, match="masks/0.nii.gz: no voxel of the organ is left at 9 mm"):
        load_volume_site(tmp_path, Preprocessing(spacing=9))[0]
