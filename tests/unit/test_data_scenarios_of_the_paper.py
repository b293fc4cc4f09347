"""The shipped tables against the numbers of the paper: sizes, ratios, splits, shared images, the unseen population."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from heterosync.data.check import inspect_site
from heterosync.data.collection import Collection
from heterosync.data.phantoms import REGIONS
from heterosync.data.scenario import write_scenario
from heterosync.data.scenario_check import check_scenario
from heterosync.data.scenario_plan import ScenarioPlan, plan_scenario
from heterosync.data.scenario_tables import (
    SiteRow,
    on_any_domain,
    read_table,
    scaled,
    scaling_notes,
    table_levels,
    table_names,
)
from heterosync.data.synthetic import SyntheticSpec, synthetic_collection
from heterosync.errors import ProblemList

#: Normal and abnormal images.
MURA = {"finger": (3256, 2197), "hand": (4211, 1661), "elbow": (3098, 2223), "forearm": (1304, 806)}
MURA |= {"humerus": (814, 735), "shoulder": (4394, 4340), "wrist": (5917, 4211)}
HOSPITALS = {"SYSU01": (3987, 7584), "SYSU06": (1066, 650), "SYSUCC": (3791, 2687), "GXFY": (910, 825)}
HOSPITALS |= {"FSSS": (243, 179), "PTC": (80, 735)}
LABEL_LEVELS = [2, 4, 6, 8, 10, 20, 40, 60, 80, 100]
QUANTITY_LEVELS = [1, 2, 4, 6, 8, 10, 20, 40, 60, 80]
#: Fig. 2 of the paper: test images of the small and of the large site.
QUANTITY_TESTS = dict(
    zip(
        QUANTITY_LEVELS,
        zip(
            (1301, 867, 520, 372, 289, 236, 123, 63, 42, 31),
            (1301, 1735, 2083, 2232, 2314, 2367, 2479, 2540, 2560, 2571),
            strict=True,
        ),
        strict=True,
    )
)


def names_only(counts: dict[str, tuple[int, int]], patients_of: int = 0) -> Collection:
    """A collection of so many images per domain without any pixels: enough for a plan."""
    labels = np.concatenate([np.repeat([0, 1], count) for count in counts.values()])
    domains = [domain for domain, count in counts.items() for _ in range(sum(count))]
    patients = (
        [f"{name} {i // patients_of}" for name, n in counts.items() for i in range(sum(n))] if patients_of else None
    )
    return Collection("pool", ("normal", "abnormal"), labels, [str(i) for i in range(len(labels))], domains, patients)


def sizes(collection: Collection, plan: ScenarioPlan) -> dict[str, dict[str, tuple[int, int]]]:
    found = {}
    for site, splits in plan.splits.items():
        counts = Counter(zip(splits, collection.labels[plan.rows[site]].tolist(), strict=True))
        found[site] = {name: (counts[name, 0], counts[name, 1]) for name in ("train", "validation", "test")}
    return found


def test_tables_and_levels() -> None:
    assert table_names() == ["combined", "feature-skew", "hospitals", "label-skew", "quantity-skew", "synthetic"]
    assert table_levels("label-skew") == [str(level) for level in LABEL_LEVELS]
    assert table_levels("quantity-skew") == [str(level) for level in QUANTITY_LEVELS]
    assert table_levels("combined") == []


def test_a_feature_skew_on_the_counts_of_mura() -> None:
    pool = names_only(MURA)
    plan = plan_scenario(pool, read_table("feature-skew"), unseen=False)
    assert len(plan.rows) == 7 and {len(rows) for rows in plan.rows.values()} == {1470}
    assert all({pool.domains[row] for row in rows} == {site[5:]} for site, rows in plan.rows.items())
    for split in sizes(pool, plan).values():
        assert split == {"train": (442, 442), "validation": (73, 73), "test": (220, 220)}  # 884, 146, 440


@pytest.mark.parametrize("level", LABEL_LEVELS)
def test_b_label_skew_on_the_counts_of_mura(level: int) -> None:
    pool = names_only({"shoulder": MURA["shoulder"]})
    plan = plan_scenario(pool, read_table("label-skew", str(level)), seed=level, unseen=False)
    first, second = (pool.subset(plan.rows[f"node-{i}"]).counts() for i in (1, 2))
    assert first == (1985, 1985) and sum(second) == 3970
    assert abs(second[0] - level * second[1]) <= (level + 1) / 2  # as near to level:1 as whole images come
    for site, split in sizes(pool, plan).items():
        assert sum(split["test"]) == 1191, site
        assert len(set(plan.rows[site].tolist())) == 3970, "an image is once in a site"
    place: dict[int, str] = {}
    for site, rows in plan.rows.items():
        for row, split_name in zip(rows, plan.splits[site], strict=True):
            assert place.setdefault(int(row), split_name) == split_name, "one image, one split, in whichever site"


def test_b_the_sites_differ_and_so_do_repeats() -> None:
    pool = names_only({"shoulder": MURA["shoulder"]})
    table = read_table("label-skew", "2")
    plans = [plan_scenario(pool, table, seed, unseen=False) for seed in (0, 0, 1)]
    rows = [[plan.rows[site].tolist() for site in ("node-1", "node-2")] for plan in plans]
    assert rows[0] == rows[1] and rows[0][0] != rows[2][0] and rows[0][1] != rows[2][1]
    shared = len(set(rows[0][0]) & set(rows[0][1]))
    assert 1700 < shared < 1900  # by chance 1985*2647/4394 + 1985*1323/4340 = 1801
    line = plans[0].describe(pool)[-2]
    assert line == f"in more than one site, in the same split: {shared} images"


@pytest.mark.parametrize("level", QUANTITY_LEVELS)
def test_c_quantity_skew_on_the_counts_of_mura(level: int) -> None:
    pool = names_only({"shoulder": MURA["shoulder"]})
    plan = plan_scenario(pool, read_table("quantity-skew", str(level)), unseen=False)
    small, large = plan.rows["node-1"], plan.rows["node-2"]
    assert len(small) + len(large) == 8678 == len({*small.tolist(), *large.tolist()})
    assert abs(len(small) - 8678 / (1 + level)) < 1
    for rows in (small, large):
        negative, positive = pool.subset(rows).counts()
        assert abs(negative - positive) <= 1
    found = sizes(pool, plan)
    assert tuple(sum(found[site]["test"]) for site in ("node-1", "node-2")) == QUANTITY_TESTS[level]


def test_d_combined_skew_is_feasible_with_and_without_patients() -> None:
    table = read_table("combined")
    for pool in (names_only(MURA), names_only(MURA, patients_of=3)):
        plan = plan_scenario(pool, table)
        assert [len(plan.rows[site]) for site in dict.fromkeys(row.site for row in table)] == [
            3127,
            2217,
            200,
            200,
            14263,
        ]


def test_e_hospitals_and_a_population_that_nobody_trains_on() -> None:
    pool = names_only(HOSPITALS)
    plan = plan_scenario(pool, read_table("hospitals"))
    found = {site: pool.subset(rows).counts() for site, rows in plan.rows.items()}
    assert found == {("unseen" if name == "PTC" else name.lower()): counts for name, counts in HOSPITALS.items()}
    assert {pool.domains[row] for row in plan.rows["unseen"]} == {"PTC"} and plan.left_out == 0


def test_patients_share_a_split_also_where_the_table_fixes_the_sizes() -> None:
    for name, level in (("label-skew", "10"), ("quantity-skew", "4")):
        pool = names_only({"shoulder": (600, 600)}, patients_of=4)
        table = scaled(read_table(name, level), 0.1)
        table = [SiteRow(r.site, r.domain, *r.counts, (r.negative // 3, r.positive // 3), r.shared) for r in table]
        plan = plan_scenario(pool, table, seed=5, unseen=False)
        assert pool.patients is not None
        places: dict[str, set[str]] = {}
        for site, rows in plan.rows.items():
            for row, split in zip(rows, plan.splits[site], strict=True):
                places.setdefault(pool.patients[row], set()).add(split)
        assert all(len(place) == 1 for place in places.values())


def test_a_pool_that_is_too_small_names_the_split_and_the_shortage() -> None:
    pool = names_only({"shoulder": (4394, 1000)})
    with pytest.raises(ProblemList) as caught:
        plan_scenario(pool, read_table("label-skew", "2"))
    assert caught.value.problems[0] == (
        "node-1: 1192 images of domain 'shoulder' with label 'abnormal' wanted for train, 600 left in pool: "
        "short by 592; ask for fewer"
    )
    assert [line.split(" left")[0].split(", ")[1] for line in caught.value.problems[1:3]] == ["100", "300"]
    with pytest.raises(ProblemList, match="node-1: pool has no domain 'shoulder'"):
        plan_scenario(names_only({"wrist": (9, 9)}), read_table("label-skew", "2"))


def test_scaling_keeps_ratios_and_minimum_counts_and_says_where_it_cannot() -> None:
    table = read_table("label-skew", "100")
    small = scaled(table, 0.05)
    assert [(row.counts, row.test, row.shared) for row in small] == [((99, 99), None, True), ((197, 3), None, True)]
    assert scaling_notes(table, 0.05) == [
        "node-2, shoulder: 197:3 in place of 197:2, since no count is scaled below 3; full size: 3931:39"
    ]
    assert scaling_notes(table, 1) == [] == scaling_notes(table, 0.1) and scaled(table, 1) == table
    pool = names_only({"shoulder": (300, 150)})
    found = sizes(pool, plan_scenario(pool, small))
    assert found["node-2"] == {"train": (118, 1), "validation": (20, 1), "test": (59, 1)}


def test_any_domain_adds_up_the_rows_of_a_site() -> None:
    rows = on_any_domain(read_table("combined"))
    assert rows[-1] == SiteRow("rare-disease-region", "*", 14256, 7) and len(rows) == 5
    assert on_any_domain(read_table("feature-skew"))[0].test == (220, 220)


# ------------------------------------------------------------------------------------------------ written and checked


def write_small(out: Path, name: str, level: str | None = None, scale: float = 0.02, seed: int = 0) -> Collection:
    table = scaled(read_table(name, level), scale)
    collection = synthetic_collection(table, seed, SyntheticSpec(image_size=16))
    write_scenario(collection, table, out, seed=seed)
    return collection


@pytest.mark.parametrize(
    ("name", "level"),
    [("feature-skew", None), ("label-skew", "20"), ("quantity-skew", "6"), ("combined", None), ("hospitals", None)],
)
def test_every_scenario_on_synthetic_images_passes_its_check(tmp_path: Path, name: str, level: str | None) -> None:
    write_small(tmp_path / "out", name, level)
    found = check_scenario(tmp_path / "out", need_anchor=False)
    assert found.problems == []
    table = scaled(read_table(name, level), 0.02)
    for site in {row.site for row in table}:
        held = np.sum([found.images[site][split] for split in found.images[site]], axis=0)
        assert tuple(held) == tuple(np.sum([row.counts for row in table if row.site == site], axis=0))
    if name == "hospitals":
        assert found.images["unseen"]["train"] == found.images["unseen"]["validation"] == (0, 0)


def test_the_generator_has_the_seven_body_regions_of_mura() -> None:
    assert set(MURA) < set(REGIONS)
    spec = SyntheticSpec(image_size=16)
    plain, scanner = (synthetic_collection([SiteRow("a", d, 1, 1)], 0, spec) for d in ("wrist", "wrist/A"))
    assert plain.pixels is not None and scanner.pixels is not None and (plain.pixels != scanner.pixels).any()
    assert synthetic_collection(read_table("feature-skew"), draw=False).counts() == (7 * 735, 7 * 735)


def test_one_seed_one_digest_another_seed_another(tmp_path: Path) -> None:
    digests = []
    for number, seed in enumerate((3, 3, 4)):
        write_small(tmp_path / str(number), "quantity-skew", "2", seed=seed)
        digests.append(check_scenario(tmp_path / str(number), need_anchor=False).digest)
    assert digests[0] == digests[1] != digests[2] and len(digests[0]) == 64


def edit(file: Path, change) -> None:
    with open(file, newline="") as stream:
        rows = list(csv.reader(stream))
    with open(file, "w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(change(rows))


def test_the_check_finds_what_breaks_a_scenario(tmp_path: Path) -> None:
    write_small(tmp_path / "lost", "feature-skew", scale=0.02)
    edit(tmp_path / "lost" / "site-hand" / "manifest.csv", lambda rows: rows[:-1])
    assert check_scenario(tmp_path / "lost", False).problems == [
        "site-hand: 14 images with label 'fracture', but the scenario has 15"
    ]

    write_small(tmp_path / "moved", "label-skew", "2", scale=0.02)
    splits = [row.split for row in inspect_site(tmp_path / "moved" / "node-1", None, need_anchor=False).rows]
    first = splits.index("test") + 1

    def to_train(rows: list[list[str]]) -> list[list[str]]:
        rows[first][rows[0].index("split")] = "train"
        return rows

    edit(tmp_path / "moved" / "node-1" / "manifest.csv", to_train)
    problems = check_scenario(tmp_path / "moved", False).problems
    assert "node-1: 25 train images with label 'intact', but the scenario has 24" in problems

    write_small(tmp_path / "leak", "quantity-skew", "1", scale=0.02)
    packs = {site: dict(np.load(tmp_path / "leak" / site / "images.npz")) for site in ("node-1", "node-2")}
    packs["node-2"]["images"][0] = packs["node-1"]["images"][0]
    np.savez(tmp_path / "leak" / "node-2" / "images.npz", **packs["node-2"])
    problems = check_scenario(tmp_path / "leak", False).problems
    assert len(problems) == 1 and problems[0].startswith("1 images are in ") and "node-2" in problems[0]
