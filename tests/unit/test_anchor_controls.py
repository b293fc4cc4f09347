"""Anchor sets with nothing to learn in them: as a pack, and in a study."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from heterosync.cli import main
from heterosync.data.anchor import PACK, read_anchor_info
from heterosync.data.anchor_controls import CONTROLS, controlled
from heterosync.study.running.cells import StudyData
from heterosync.study.running.plan_file import read_plan
from toys import SMOKE, toy_images

LABELS = np.repeat([0, 1], 30)
IMAGES = toy_images(LABELS, 0, size=12)


def stored(pack: Path) -> dict[bytes, int]:
    """Picture -> label of a written pack."""
    with np.load(pack / PACK) as found:
        return {image.tobytes(): int(label) for image, label in zip(found["images"], found["labels"], strict=True)}


def test_each_control_takes_one_thing_away() -> None:
    images, labels, name = controlled(IMAGES, LABELS, "toy", None, 0)
    assert (np.stack(images) == IMAGES).all() and (labels == LABELS).all() and name == "toy"
    images, labels, name = controlled(IMAGES, LABELS, "toy", "shuffled_labels", 0)
    assert (np.stack(images) == IMAGES).all() and name == "toy, shuffled labels"
    assert sorted(labels) == sorted(LABELS) and 15 <= (labels != LABELS).sum() <= 45
    images, labels, name = controlled(IMAGES, LABELS, "toy", "noise_pixels", 0)
    assert (labels == LABELS).all() and name == "toy, noise pixels"
    noise = np.stack(images)
    assert noise.shape == IMAGES.shape and noise.dtype == np.uint8 and len(np.unique(noise)) > 200
    bright = noise[:, :6, :6].mean((1, 2))  # where the toys show their label
    assert abs(bright[LABELS == 1].mean() - bright[LABELS == 0].mean()) < 15 < 60
    assert IMAGES[LABELS == 1, :6, :6].mean() - IMAGES[LABELS == 0, :6, :6].mean() > 60


@pytest.mark.parametrize("control", CONTROLS)
def test_the_seed_decides(control: str) -> None:
    first, again, other = (controlled(IMAGES, LABELS, "toy", control, seed)[:2] for seed in (0, 0, 1))
    assert all((a == b).all() for a, b in zip(first[0], again[0], strict=True)) and (first[1] == again[1]).all()
    assert (first[1] != other[1]).any() or (first[0][0] != other[0][0]).any()


@pytest.mark.parametrize("control", CONTROLS)
def test_the_command_writes_a_pack_under_control(control: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "public.npz", images=IMAGES, labels=np.where(LABELS == 1, "on", "off"))
    order = ["data", "anchor", str(tmp_path / "public.npz"), "--negative", "off", "--positive", "on"]
    order += ["--per-class", "20", "--out"]
    assert main([*order, str(tmp_path / "plain")]) == 0
    assert main([*order, str(tmp_path / "pack"), "--control", control]) == 0
    plain, pack = stored(tmp_path / "plain"), stored(tmp_path / "pack")
    assert sorted(plain.values()) == sorted(pack.values()) and plain != pack
    assert (plain.keys() == pack.keys()) == (control == "shuffled_labels")
    info = read_anchor_info(tmp_path / "pack")
    assert info.name.endswith(control.replace("_", " ")) and info.balanced and info.n == 40


ANCHORS = {
    "synthetic": {"kind": "synthetic", "per_class": 10},
    "source": {"path": "public.npz", "negative": "off", "positive": "on", "per_class": 10},
    "table": {"table": "mine.csv", "sources": {"public": "public.npz"}},
}


@pytest.mark.parametrize("kind", ANCHORS)
@pytest.mark.parametrize("control", CONTROLS)
def test_a_study_gives_every_site_the_same_set_under_control(kind: str, control: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "public.npz", images=IMAGES, labels=np.where(LABELS == 1, "on", "off"))
    np.savez(tmp_path / "images.npz", images=toy_images(LABELS, 1, size=32), labels=np.where(LABELS == 1, "b", "a"))
    (tmp_path / "two.csv").write_text("site,negative,positive\nsite-a,8,8\nsite-b,8,8\n")
    row = "*,public,off,on,10,10"
    (tmp_path / "mine.csv").write_text(f"site,source,negative_label,positive_label,negative,positive\n{row}\n")
    plan = {
        "methods": ["hsl_shared"],
        "source": {"path": "images.npz", "negative": "a", "positive": "b"},
        "scenarios": [
            {"scenario": "two.csv", "name": "plain", "anchor": ANCHORS[kind]},
            {"scenario": "two.csv", "name": "control", "anchor": {**ANCHORS[kind], "control": control}},
        ],
        "training": SMOKE,
        "engine": "inprocess",
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    data = StudyData(read_plan(tmp_path / "plan.yaml"))
    digests = {}
    for cell in data.cells:
        folder = data.write(cell, tmp_path / "study")
        (digests[cell.entry.name],) = {read_anchor_info(folder / site / "anchor").digest for site in cell.sites}
        assert read_anchor_info(folder / "site-a" / "anchor").n == 20
    assert digests["plain"] != digests["control"]
    assert data.request(data.cells[0]) != data.request(data.cells[1])
