"""Folds: the paper's sizes, whole patients, the same draw again."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from heterosync.data.volume_dataset import load_volume_site
from heterosync.data.volume_folds import assign_folds, read_folds, sizes, write_folds
from heterosync.data.volume_site import CaseRow
from heterosync.errors import ProblemList, UserError
from volume_toys import save_nifti, scan, volume_site, write_rows


def rows(count: int, per_patient: int = 1, split: list[str] | None = None) -> list[CaseRow]:
    return [
        CaseRow(
            i + 2, f"images/{i:03}.nii.gz", f"masks/{i:03}.nii.gz", f"p{i // per_patient}", split[i] if split else None
        )
        for i in range(count)
    ]


def drawn(cases: list[CaseRow], stored: dict[str, int] | None = None, folds: int = 5, seed: int = 0) -> dict[str, int]:
    places = assign_folds(cases, [row.image for row in cases], stored or {}, folds, seed)
    return {row.image: place for row, place in zip(cases, places, strict=True)}


def test_the_paper_has_20_held_out_and_5_sets_of_16() -> None:
    assert Counter(drawn(rows(100)).values()) == {0: 20, 1: 16, 2: 16, 3: 16, 4: 16, 5: 16}


@pytest.mark.parametrize(
    ("cases", "folds", "wanted"), [(10, 5, [2, 2, 2, 2, 1, 1]), (6, 5, [1] * 6), (3, 2, [1, 1, 1])]
)
def test_other_sizes_keep_the_shares(cases: int, folds: int, wanted: list[int]) -> None:
    assert sizes(cases, folds) == wanted
    held = Counter(drawn(rows(cases), folds=folds).values())
    assert [held[place] for place in range(folds + 1)] == wanted


def test_the_draw_does_not_depend_on_the_order_of_the_rows_but_on_the_seed() -> None:
    cases = rows(40, 2)
    shuffled = list(cases)
    random.Random(1).shuffle(shuffled)
    assert drawn(cases) == drawn(shuffled) != drawn(cases, seed=1)


@pytest.mark.parametrize("per_patient", [2, 3, 7])
def test_a_patient_is_in_one_place_and_no_fold_is_empty(per_patient: int) -> None:
    cases = rows(6 * per_patient + 1, per_patient)
    places = drawn(cases)
    assert set(places.values()) == set(range(6))
    for patient in {row.patient for row in cases}:
        assert len({places[row.image] for row in cases if row.patient == patient}) == 1


def test_cases_of_equal_content_share_a_place() -> None:
    cases = rows(30)
    content = [str(i % 15) for i in range(30)]
    places = assign_folds(cases, content, {}, 5, 0)
    assert places[:15] == places[15:]


def test_given_test_cases_stay_and_the_rest_is_dealt() -> None:
    split = ["test" if i % 3 == 0 else "train" for i in range(30)]
    places = list(drawn(rows(30, split=split)).values())
    assert [place == 0 for place in places] == [name == "test" for name in split]
    assert Counter(places) == {0: 10, 1: 4, 2: 4, 3: 4, 4: 4, 5: 4}


def test_new_cases_do_not_move_those_that_are_drawn(tmp_path: Path) -> None:
    first = rows(20)
    places = drawn(first)
    write_folds(tmp_path, first, list(places.values()), {})
    stored = read_folds(tmp_path, 5)
    assert stored == places
    more = drawn(rows(26), stored)
    assert {image: more[image] for image in places} == places
    assert Counter(more.values()) == {0: 5, 1: 5, 2: 4, 3: 4, 4: 4, 5: 4}


def test_every_experiment_sees_the_same_folds(tmp_path: Path) -> None:
    manifest = volume_site(tmp_path, 12)
    first = load_volume_site(tmp_path)
    table = (tmp_path / "folds.csv").read_bytes()
    assert load_volume_site(tmp_path).places == first.places
    (tmp_path / "folds.csv").unlink()
    assert load_volume_site(tmp_path).places == first.places and (tmp_path / "folds.csv").read_bytes() == table
    save_nifti(tmp_path / "images/new.nii.gz", scan(99))
    write_rows(tmp_path, [["images/new.nii.gz", manifest[0][1]], *manifest[1:]])
    later = load_volume_site(tmp_path)
    assert later.places[1:] == first.places[1:]

    seen = []
    for number in range(1, 6):
        parts = first.fold(number)
        assert sorted(case for part in parts.values() for case in part) == list(range(12))
        assert parts["test"].tolist() == first.fold(1)["test"].tolist() and len(parts["test"]) == 2
        seen += parts["validation"].tolist()
    assert len(seen) == len(set(seen)) == 10
    with pytest.raises(UserError, match="folds 1 to 5"):
        first.fold(6)


@pytest.mark.parametrize("line", ["a,train,", "a,test,1", "a,train,6", "a,both,1", "a,train", "a,train,x"])
def test_damaged_table(tmp_path: Path, line: str) -> None:
    (tmp_path / "folds.csv").write_text(f"image,split,fold\n{line}\n")
    with pytest.raises(ProblemList, match="folds.csv row 2: .*delete it to draw new folds"):
        read_folds(tmp_path, 5)
