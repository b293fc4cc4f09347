"""The cache gives what decoding gives, notices edits, survives damage and may be shared."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

import heterosync.data.cache as cache_module
from data_toys import picture, save_png
from heterosync.data.cache import cache_root, load_pictures
from heterosync.data.decoding import Decoding
from heterosync.data.images import content_hash
from heterosync.data.readers import read_image, to_size
from heterosync.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        save_png(tmp_path / f"{i}.png", picture(i, (20, 16) if i % 2 else (20, 16, 3)))
    np.savez_compressed(tmp_path / "pack.npz", images=picture(9, (4, 10, 12)))
    return tmp_path


NAMES = ["3.png", "pack.npz#2", "0.png", "1.png", "pack.npz#0", "2.png", "pack.npz#3", "4.png", "pack.npz#1"]


@pytest.fixture
def decoded_names(monkeypatch) -> list[str]:
    """Names that are really decoded."""
    names: list[str] = []
    original = Decoding._read
    monkeypatch.setattr(Decoding, "_read", lambda self, row: names.append(self.names[row]) or original(self, row))
    return names


def load(folder: Path, names=NAMES, size=14, channels=3, window=None):
    return load_pictures(folder, names, size, channels, window, cache_root(folder))


@pytest.mark.parametrize("channels", [1, 3])
def test_same_pixels_as_decoding(folder: Path, channels, decoded_names):
    expected = np.stack([to_size(read_image(folder / name), 14, channels) for name in NAMES])
    first, second = load(folder, channels=channels), load(folder, channels=channels)
    memory = load_pictures(folder, NAMES, 14, channels)
    for got in (first, second, memory):
        assert got.errors == {}
        assert got.pixels.dtype == np.uint8 and (got.pixels == expected).all()
        assert got.content == [content_hash(read_image(folder / name)) for name in NAMES]
    assert isinstance(second.pixels, np.memmap) and not second.pixels.flags.writeable
    assert sorted(decoded_names) == sorted(2 * NAMES), "the second load decodes nothing"


def test_without_a_size_only_hashes(folder: Path):
    found = load_pictures(folder, NAMES, None, root=cache_root(folder))
    assert found.pixels is None and None not in found.content
    assert not list(folder.glob(".heterosync/cache/*.npy"))


def test_edit_of_the_same_size_and_time_is_noticed_and_only_it_decoded(folder: Path, decoded_names):
    np.save(folder / "x.npy", picture(30))
    names = [*NAMES, "x.npy"]
    load(folder, names)
    decoded_names.clear()
    before = os.stat(folder / "x.npy")
    np.save(folder / "x.npy", picture(31))
    os.utime(folder / "x.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(folder / "x.npy").st_size == before.st_size
    found = load(folder, names)
    assert decoded_names == ["x.npy"]
    assert (found.pixels[-1] == to_size(picture(31), 14, 3)).all()
    assert (found.pixels[0] == to_size(read_image(folder / "3.png"), 14, 3)).all()
    assert len(list(folder.glob(".heterosync/cache/*.npy"))) == 1, "the replaced array is gone"


def test_touched_file_is_not_decoded_again(folder: Path, decoded_names):
    load(folder)
    decoded_names.clear()
    os.utime(folder / "0.png")
    load(folder)
    assert decoded_names == []


def test_new_and_removed_rows(folder: Path, decoded_names):
    load(folder, NAMES[:6])
    decoded_names.clear()
    found = load(folder, NAMES[2:])
    assert sorted(decoded_names) == sorted(NAMES[6:])
    assert (found.pixels == load_pictures(folder, NAMES[2:], 14).pixels).all()


def test_preprocessing_has_its_own_cache(folder: Path):
    np.save(folder / "x.npy", picture(40, dtype=np.uint16))
    sizes = [load(folder, ["x.npy"], size).pixels.shape for size in (14, 20, 14)]
    assert sizes == [(1, 3, 14, 14), (1, 3, 20, 20), (1, 3, 14, 14)]
    plain, windowed = load(folder, ["x.npy"]), load(folder, ["x.npy"], window=(100.0, 50.0))
    assert (plain.pixels != windowed.pixels).any()


@pytest.mark.parametrize("damage", ["cut array", "no array", "cut index", "wrong index", "empty index"])
def test_damaged_cache_is_made_again(folder: Path, damage):
    expected = np.array(load(folder).pixels)
    array = next(folder.glob(".heterosync/cache/*.npy"))
    index = next(folder.glob(".heterosync/cache/*.json"))
    match damage:
        case "cut array":
            array.write_bytes(array.read_bytes()[:200])
        case "no array":
            array.unlink()
        case "cut index":
            index.write_text(index.read_text()[:40])
        case "wrong index":
            index.write_text('{"rows": 3}')
        case "empty index":
            index.write_text("")
    assert (load(folder).pixels == expected).all()
    assert isinstance(load(folder).pixels, np.memmap)


def test_bad_pictures_are_all_reported_and_nothing_is_kept(folder: Path):
    (folder / "0.png").write_bytes(b"nonsense")
    (folder / "2.png").unlink()
    found = load(folder)
    assert sorted(found.errors) == [2, 5] and found.pixels is None
    assert found.content[2] is None and found.content[0] is not None
    assert not list(folder.glob(".heterosync/cache/*.npy")) and not list(folder.glob(".heterosync/cache/.*"))


def test_old_caches_are_pruned(folder: Path):
    root = cache_root(folder)
    (root / ".dead.npy").write_bytes(b"x")
    os.utime(root / ".dead.npy", (time.time() - 1e6,) * 2)
    for size in range(4, 4 + cache_module.KEPT + 3):
        load(folder, size=size)
    assert len(list(root.glob("*.json"))) == len(list(root.glob("*.npy"))) == cache_module.KEPT
    assert not (root / ".dead.npy").exists()
    live = load(folder, size=14)
    for file in root.glob("*.npy"):
        file.unlink()
    assert live.pixels.sum() > 0, "a removed array stays readable for those who mapped it"


def test_place(tmp_path: Path):
    (tmp_path / "a").mkdir()
    assert cache_root(tmp_path / "a", environ={}) == tmp_path / "a/.heterosync/cache"
    elsewhere = cache_root(tmp_path / "a", environ={"HETEROSYNC_CACHE": str(tmp_path / "c")})
    assert elsewhere.parent == tmp_path / "c" and elsewhere.name.startswith("a-")
    assert cache_root(tmp_path / "a", tmp_path / "d").parent == tmp_path / "d"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        cache_root(tmp_path / "a", tmp_path / "file")


def test_read_only_site_folder_has_no_cache(tmp_path: Path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert cache_root(tmp_path, environ={}) is None


def test_full_disk_is_a_clear_error(folder: Path, monkeypatch):
    def full(self, path, decoding):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module._Cache, "_write", full)
    with pytest.raises(UserError, match="the disk is full"):
        load(folder)


def _sum(folder: Path) -> tuple[str, int]:
    pixels = load(folder, size=64).pixels
    return type(pixels).__name__, int(pixels.sum())


def test_several_processes_start_at_once(folder: Path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        answers = set(pool.map(_sum, [folder] * 3, chunksize=1))
    assert answers == {("memmap", int(load_pictures(folder, NAMES, 64).pixels.sum()))}
    assert len(list(folder.glob(".heterosync/cache/*.npy"))) == 1


def test_second_load_of_650_images_is_fast(tmp_path: Path):
    small = picture(50, (8, 8))
    names = [f"{i}.png" for i in range(650)]
    for i, name in enumerate(names):
        small[0, 0], small[0, 1] = i % 256, i // 256
        save_png(tmp_path / name, small)
    load(tmp_path, names, 32)
    start = time.perf_counter()
    found = load(tmp_path, names, 32)
    assert len(found.pixels) == 650
    assert time.perf_counter() - start < 0.5  # 0.01 s on an idle machine
