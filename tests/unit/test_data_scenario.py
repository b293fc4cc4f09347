"""Scenarios: exact counts, no image and no patient in two sites, one draw per seed."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from heterosync.data.anchor import write_anchor
from heterosync.data.check import check_site
from heterosync.data.collection import Collection, without_duplicates
from heterosync.data.dataset import load_site
from heterosync.data.scenario import write_scenario
from heterosync.data.scenario_plan import draw_balanced, plan_scenario
from heterosync.data.scenario_tables import SiteRow, read_table, scaled
from heterosync.errors import ProblemList, UserError


def pool(counts: dict[str, tuple[int, int]], patients_of: int = 0, seed: int = 0) -> Collection:
    """An array collection with (negative, positive) counts per domain; `patients_of` images per patient."""
    labels = np.concatenate([np.repeat([0, 1], count) for count in counts.values()])
    n = len(labels)
    return without_duplicates(
        Collection(
            "pool",
            ("normal", "abnormal"),
            labels.astype(np.int64),
            [f"i{i}" for i in range(n)],
            [domain for domain, count in counts.items() for _ in range(sum(count))],
            [f"p{i // patients_of}" for i in range(n)] if patients_of else None,
            np.random.default_rng(seed).integers(0, 256, (n, 8, 8), dtype=np.uint8),
        )
    )


def counts_of(collection: Collection, rows: np.ndarray) -> tuple[int, int]:
    return collection.subset(rows).counts()


def test_combined_table_is_the_reconstruction_of_scenario_d() -> None:
    totals: dict[str, list[int]] = {}
    for row in read_table("combined"):
        total = totals.setdefault(row.site, [0, 0])
        total[0] += row.negative
        total[1] += row.positive
    assert totals == {
        "screening-centre": [2843, 284],
        "specialised-hospital": [202, 2015],
        "clinic-1": [100, 100],
        "clinic-2": [100, 100],
        "rare-disease-region": [14256, 7],
    }
    # feasible with the published MURA counts (normal, abnormal), every row of its own body part
    mura = {"finger": (3256, 2197), "hand": (4211, 1661), "elbow": (3098, 2223), "forearm": (1304, 806)}
    mura |= {"humerus": (814, 735), "shoulder": (4394, 4340), "wrist": (5917, 4211)}
    for row in read_table("combined"):
        assert row.negative <= mura[row.domain][0] and row.positive <= mura[row.domain][1]


@pytest.mark.parametrize(
    "text",
    [
        "# my sites\nsite,domain,negative,positive\na,,3,2\nb,x,1,1\n",
        "\ufeffsite;domain;negative;positive\n# then the rows\na;*;3;2\nb;x;1;1\n",
        "site\tnegative\tpositive\tdomain\na\t3\t2\t\n\nb\t1\t1\tx\n",
    ],
)
def test_table_without_domain_and_as_spreadsheets_save_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    assert read_table(tmp_path / "t.csv") == [SiteRow("a", "*", 3, 2), SiteRow("b", "x", 1, 1)]
    (tmp_path / "t.csv").write_text("site,negative,positive\na,3,2\n")
    table = read_table(tmp_path / "t.csv")
    assert table == [SiteRow("a", "*", 3, 2)]
    assert counts_of(pool({"": (9, 9)}), plan_scenario(pool({"": (9, 9)}), table).rows["a"]) == (3, 2)


def test_plan_draws_exact_disjoint_counts_and_leaves_the_rest_unseen() -> None:
    collection = pool({"elbow": (30, 20), "Wrist": (25, 15)})
    table = [SiteRow("a", "elbow", 10, 4), SiteRow("b", "*", 12, 9), SiteRow("a", "wrist", 5, 2)]
    plan = plan_scenario(collection, table, seed=3)
    assert {site: counts_of(collection, rows) for site, rows in plan.rows.items()} == {
        "a": (15, 6),
        "b": (12, 9),
        "unseen": (28, 20),
    }
    assert sorted(np.concatenate(list(plan.rows.values()))) == list(range(90)) and plan.left_out == 0
    assert sum(collection.domains[row] == "elbow" for row in plan.rows["a"]) == 14
    assert plan.describe(collection)[:2] == ["a, Wrist: 5 normal, 2 abnormal", "a, elbow: 10 normal, 4 abnormal"]


def test_one_seed_one_draw() -> None:
    collection = pool({"x": (40, 40)})
    table = [SiteRow("a", "*", 10, 10)]
    first, again, other = (plan_scenario(collection, table, seed).rows["a"].tolist() for seed in (0, 0, 1))
    assert first == again != other


def test_no_patient_in_two_sites_unless_images_are_the_unit() -> None:
    collection = pool({"x": (60, 60)}, patients_of=8)  # patients 7 and 8 have images of both classes
    table = [SiteRow("a", "*", 20, 20), SiteRow("b", "*", 20, 20)]
    assert collection.patients is not None
    for seed in range(5):
        plan = plan_scenario(collection, table, seed)
        groups = [{collection.patients[row] for row in rows} for rows in plan.rows.values()]
        assert len(set.union(*groups)) == sum(map(len, groups))
        assert [counts_of(collection, plan.rows[site]) for site in "ab"] == [(20, 20), (20, 20)]
        assert plan.left_out == 120 - sum(map(len, plan.rows.values()))
    assert plan_scenario(collection, table, group="image").left_out == 0


def test_impossible_counts_name_site_domain_class_and_shortage() -> None:
    collection = pool({"elbow": (10, 5)})
    table = [SiteRow("a", "elbow", 6, 2), SiteRow("b", "elbow", 6, 9), SiteRow("c", "elbov", 1, 1)]
    with pytest.raises(ProblemList) as caught:
        plan_scenario(collection, table)
    assert caught.value.problems == [
        "b: 6 images of domain 'elbow' with label 'normal' wanted, 4 left in pool: short by 2; ask for fewer",
        "b: 9 images of domain 'elbow' with label 'abnormal' wanted, 3 left in pool: short by 6; ask for fewer",
        "c: pool has no domain 'elbov'; did you mean 'elbow'? known: elbow",
    ]


def test_scaled_keeps_three_of_each_class() -> None:
    rows = scaled([SiteRow("a", "x", 200, 7), SiteRow("a", "y", 0, 2)], 0.1)
    assert [(row.negative, row.positive) for row in rows] == [(20, 3), (0, 2)]
    with pytest.raises(UserError, match="scale must be a number above 0"):
        scaled(rows, 0)


def test_written_scenario_passes_the_check_and_loads(tmp_path: Path) -> None:
    collection = pool({"x": (40, 30)})
    other = pool({"z": (5, 5)}, seed=9)
    write_anchor(tmp_path / "anchor", other.pixels, other.labels, "public", "off", "on")
    table = [SiteRow("a", "x", 20, 10), SiteRow("b", "x", 10, 12)]
    folders = write_scenario(collection, table, tmp_path / "out", tmp_path / "anchor", seed=1)
    assert [folder.name for folder in folders] == ["a", "b", "unseen"]
    assert [check_site(folder) for folder in folders] == [[], [], []]
    sites = {folder.name: load_site(folder, 8, cache=tmp_path / "cache" / folder.name) for folder in folders}
    assert {name: {split: len(rows) for split, rows in site.splits.items()} for name, site in sites.items()} == {
        "a": {"train": 18, "validation": 3, "test": 9},
        "b": {"train": 13, "validation": 2, "test": 7},
        "unseen": {"train": 0, "validation": 0, "test": 18},
    }
    assert len({site.anchor_digest for site in sites.values()}) == 1
    with open(tmp_path / "out" / "a" / "manifest.csv") as file:
        row = next(csv.DictReader(file))
    assert collection.pixels is not None
    stored = np.load(tmp_path / "out" / "a" / "images.npz")["images"][0]
    assert (stored == collection.pixels[collection.ids.index(row["source"])]).all(), "a row names its source image"


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collection = pool({"x": (20, 20)})
    table = [SiteRow("a", "x", 5, 5), SiteRow("b", "x", 5, 5)]
    monkeypatch.setattr("heterosync.data.scenario.csv.writer", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_scenario(collection, table, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    write_scenario(collection, table, tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        write_scenario(collection, table, tmp_path / "out")


def test_anchor_must_be_other_images(tmp_path: Path) -> None:
    collection = pool({"x": (20, 20)})
    part = draw_balanced(collection, 4)
    assert part.counts() == (4, 4)
    write_anchor(tmp_path / "anchor", part.pixels, part.labels, "leak", "off", "on")
    with pytest.raises(UserError, match="8 images of the anchor pack are in pool too"):
        write_scenario(collection, [SiteRow("a", "x", 5, 5)], tmp_path / "out", tmp_path / "anchor")
    assert not (tmp_path / "out").exists()


def test_unseen_needs_both_classes() -> None:
    collection = pool({"x": (10, 5)})
    plan = plan_scenario(collection, [SiteRow("a", "x", 5, 5)])
    assert list(plan.rows) == ["a"] and plan.left_out == 5
    assert plan.describe(collection)[-1] == "in no site: 5 images"
