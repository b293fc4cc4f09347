"""No test image of any site is in a training or validation split, or in an anchor pack, of any site of the alliance."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from heterosync.data.anchor import write_anchor
from heterosync.data.dataset import SPLITS, load_site
from heterosync.data.importers import from_npz
from heterosync.data.scenario import write_scenario
from heterosync.data.scenario_plan import draw_balanced
from heterosync.data.scenario_tables import read_table
from heterosync.data.synthetic import make_alliance

Hashes = dict[str, set[str]]


def hash_of(pixels: np.ndarray) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def stored_images(site: Path) -> Hashes:
    """Hashes of the stored images of each split and of the anchor, without heterosync's own hashing and reading."""
    data = load_site(site, 8, need_anchor=(site / "anchor").is_dir())
    images = np.load(site / "images.npz")["images"]
    found = {}
    for split in SPLITS:
        names = [data.primary.ids[row] for row in data.splits[split]]
        assert all(name.startswith("images.npz#") for name in names)
        found[split] = {hash_of(images[int(name.split("#")[1])]) for name in names}
        assert len(found[split]) == len(names), "no copies inside a split"
    found["anchor"] = {hash_of(image) for image in np.load(site / "anchor" / "anchor.npz")["images"]}
    return found


def leaks(folder: Path) -> tuple[list[str], dict[str, Hashes]]:
    sites = {site.name: stored_images(site) for site in sorted(folder.iterdir()) if site.is_dir()}
    found = []
    for tested, own in sites.items():
        for other, theirs in sites.items():
            for part in ("train", "validation", "anchor"):
                common = len(own["test"] & theirs[part])
                found += [f"{common} test images of {tested} in {part} of {other}"] if common else []
            if other != tested and own["test"] & theirs["test"]:
                found.append(f"{tested} and {other} share test images")
    return found, sites


def test_synthetic_alliance(tmp_path: Path) -> None:
    names = make_alliance(tmp_path / "data", seed=3, image_size=16, scale=0.25)
    found, sites = leaks(tmp_path / "data")
    assert found == [] and sorted(sites) == sorted([*names, "unseen"])
    assert all(len(site["test"]) >= 2 and len(site["anchor"]) == 50 for site in sites.values())
    assert not sites["unseen"]["train"] and not sites["unseen"]["validation"]


def busi_like(file: Path, seed: int) -> Path:
    """Three classes in colour, with what the published BUSI has: copies of one image, some under two labels."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (160, 12, 12, 3), dtype=np.uint8)
    labels = np.repeat([0, 1, 2], (80, 50, 30))
    images[60:70] = images[:10]  # copies with the same label
    images[120:125] = images[20:25]  # copies with the other label
    np.savez(file, images=images, labels=labels, classes=np.array(["benign", "malignant", "normal"]))
    return file


def write_busi(folder: Path, seed: int) -> Path:
    busi = from_npz(busi_like(folder / "busi.npz", seed), "benign", "malignant")
    (folder / "t.csv").write_text("site,negative,positive\na,20,5\nb,5,20\nc,8,8\n")
    public = np.random.default_rng(seed + 100).integers(0, 256, (40, 12, 12), dtype=np.uint8)
    np.savez(folder / "public.npz", images=public, labels=np.arange(40) % 2)
    part = draw_balanced(from_npz(folder / "public.npz", "0", "1"), 10)
    write_anchor(folder / "anchor", part.pixels, part.labels, "public", "off", "on")
    write_scenario(busi, read_table(folder / "t.csv"), folder / "data", folder / "anchor", seed)
    return folder / "data"


@pytest.mark.parametrize("seed", [0, 1])
def test_busi_like_scenario(tmp_path: Path, seed: int) -> None:
    found, sites = leaks(write_busi(tmp_path, seed))
    assert found == [] and sorted(sites) == ["a", "b", "c", "unseen"]
    assert sum(len(site[split]) for site in sites.values() for split in SPLITS) == 110  # 130 less 10 copies and 2 x 5


def test_a_planted_leak_is_found(tmp_path: Path) -> None:
    folder = write_busi(tmp_path, 2)
    sites = {name: load_site(folder / name, 8) for name in ("a", "b")}
    packs = {name: dict(np.load(folder / name / "images.npz")) for name in sites}
    tested, trained = sites["a"].splits["test"][0], sites["b"].splits["train"][0]
    packs["b"]["images"][trained] = packs["a"]["images"][tested]
    np.savez(folder / "b" / "images.npz", **packs["b"])
    assert leaks(folder)[0] == ["1 test images of a in train of b"]
