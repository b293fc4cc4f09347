"""The 60/10/30 split: sizes, strata, patients, and that a drawn split stays."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from heterosync.data.site import SPLITS, Row
from heterosync.data.splits import assign_splits, read_splits, split_rows, split_sizes, write_splits
from heterosync.errors import ProblemList


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (100, [60, 10, 30]),
        (735, [441, 74, 220]),
        (284, [171, 28, 85]),
        (7, [4, 1, 2]),
        (3, [1, 1, 1]),
        (2, [1, 0, 1]),
        (1, [1, 0, 0]),
        (0, [0, 0, 0]),
    ],
)
def test_sizes(n, sizes):
    assert split_sizes(n) == sizes


def test_sizes_always_add_up_and_hold_the_minimum():
    for n in range(3000):
        sizes = split_sizes(n)
        assert sum(sizes) == n
        assert n < 3 or min(sizes) >= 1
        assert all(abs(size - n * part) < 1 or n < 10 for size, part in zip(sizes, (0.6, 0.1, 0.3), strict=True))


@pytest.mark.parametrize(
    ("counts", "test"),
    [((2843, 284), 938), ((202, 2015), 665), ((100, 100), 60), ((14256, 7), 4279), ((735, 735), 440)],
)
def test_test_sizes_of_the_paper(counts, test):
    assert len(split_rows(np.repeat([0, 1], counts), None, 0)["test"]) == test


def test_stratified_disjoint_seeded():
    labels = np.repeat([0, 1], (140, 60))
    splits = split_rows(labels, None, 3)
    assert sorted(np.concatenate(list(splits.values()))) == list(range(200))
    assert {
        name: (int((labels[rows] == 0).sum()), int((labels[rows] == 1).sum())) for name, rows in splits.items()
    } == {
        "train": (84, 36),
        "validation": (14, 6),
        "test": (42, 18),
    }
    again, other = split_rows(labels, None, 3), split_rows(labels, None, 4)
    assert all((splits[name] == again[name]).all() for name in SPLITS)
    assert any((splits[name] != other[name]).any() for name in SPLITS)
    assert all(rows.dtype == np.int64 and (np.diff(rows) > 0).all() for rows in splits.values())


def test_every_image_is_as_likely_to_be_tested():
    labels = np.repeat([0, 1], (20, 20))
    tested = sum(np.isin(np.arange(40), split_rows(labels, None, seed)["test"]) for seed in range(400))
    assert 80 < tested.min() and tested.max() < 165  # 120 expected, sd 9


def test_patients_stay_together_and_sizes_are_near():
    rng = np.random.default_rng(0)
    patients = [f"p{number}" for number in rng.integers(0, 120, 400)]
    labels = (np.array([int(p[1:]) for p in patients]) % 4 == 0).astype(int)
    splits = split_rows(labels, patients, 0)
    held = [{patients[row] for row in rows} for rows in splits.values()]
    assert not held[0] & held[1] and not held[0] & held[2] and not held[1] & held[2]
    for name, fraction in zip(SPLITS, (0.6, 0.1, 0.3), strict=True):
        for label in (0, 1):
            assert abs((labels[splits[name]] == label).sum() - fraction * (labels == label).sum()) <= 4


def test_few_large_patients_still_give_every_split_both_classes():
    for seed in range(20):
        patients = ["a"] * 30 + ["b"] * 5 + ["c"] * 5 + ["d"] * 30 + ["e"] * 5 + ["f"] * 5
        labels = np.repeat([0, 1], 40)
        splits = split_rows(labels, patients, seed)
        assert all(set(labels[rows]) == {0, 1} for rows in splits.values())


def rows_for(names: list[str], patients: list[str] | None = None) -> list[Row]:
    return [Row(i + 2, name, i % 2, patients[i] if patients else None, None) for i, name in enumerate(names)]


def test_draw_does_not_depend_on_the_order_of_rows():
    rows = rows_for([f"{i:02d}.png" for i in range(40)])
    first = dict(zip([r.image for r in rows], assign_splits(rows, [r.image for r in rows], {}, 0), strict=True))
    random.Random(0).shuffle(rows)
    assert dict(zip([r.image for r in rows], assign_splits(rows, [r.image for r in rows], {}, 0), strict=True)) == first


def test_copies_of_one_picture_share_a_split():
    rows = rows_for([f"{i:02d}.png" for i in range(40)])
    content = [f"c{i % 2}{i // 4}" for i in range(40)]
    splits = assign_splits(rows, content, {}, 0)
    assert all(len({s for s, c in zip(splits, content, strict=True) if c == one}) == 1 for one in content)


def test_new_rows_join_without_moving_old_ones():
    rows = rows_for([f"{i:02d}.png" for i in range(40)], [f"p{i // 2}" for i in range(40)])
    content = [row.image for row in rows]
    old = assign_splits(rows[:30], content[:30], {}, 0)
    stored = dict(zip(content[:30], old, strict=True)) | {"removed.png": "train"}
    rows.append(Row(99, "late.png", 0, "p0", None))  # a patient who is already there
    content.append("late.png")
    new = assign_splits(rows, content, stored, 0)
    assert new[:30] == old and new[-1] == old[0]
    assert new == assign_splits(rows, content, stored, 0)
    assert [new.count(split) for split in SPLITS] == pytest.approx([24, 4, 12], abs=3)


def test_split_column_wins():
    rows = [Row(2, "a", 0, None, "test"), Row(3, "b", 1, None, "train")]
    assert assign_splits(rows, ["x", "y"], {"a": "train"}, 0) == ["test", "train"]


def test_file_roundtrip(tmp_path: Path):
    rows = rows_for(["a,b.png", "c.png"])
    assert read_splits(tmp_path) == {}
    write_splits(tmp_path, rows, ["train", "test"], {"gone.png": "validation"})
    assert read_splits(tmp_path) == {"a,b.png": "train", "c.png": "test", "gone.png": "validation"}
    before = (tmp_path / "splits.csv").stat().st_mtime_ns
    write_splits(tmp_path, rows, ["train", "test"], read_splits(tmp_path))
    assert (tmp_path / "splits.csv").stat().st_mtime_ns == before
    (tmp_path / "splits.csv").write_text("image,split\na,trian\n")
    with pytest.raises(ProblemList, match="splits.csv row 2: unknown split: did you mean 'train'"):
        read_splits(tmp_path)
