"""The CSV tables of a study on volumes: every number of its report, for other programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, fields

from heterosync.study.evidence.cross_site import (
    OVERALL,
    PUBLISHED,
    PUBLISHED_CASES,
    SCORE_COLUMNS,
    PairedTest,
    SetScores,
    summarise_sets,
)
from heterosync.study.evidence.tables import costs_csv
from heterosync.study.evidence.volume_outcomes import CrossValidation, VolumeStudy
from heterosync.study.table import csv_table

_PLACE = ("scenario", "repeat")


def fold_rows(validation: CrossValidation) -> list[tuple[str, str, SetScores]]:
    """(label, fold, scores): every submodel on the test sets where its run tested it: at home, or at all sites."""
    return [
        (one.label, one.part, found)
        for one in validation.submodels
        for found in summarise_sets(one.scores)
        if found.site != OVERALL
    ]


def volume_tables(
    study: VolumeStudy, tests: Mapping[tuple[str, int], Mapping[str, Mapping[str, PairedTest]]], reference: str | None
) -> dict[str, str]:
    """File name -> text. tests: (scenario, repeat) -> test set -> model."""
    each = [((one.scenario, one.repeat), one) for one in study.validations]
    of_sets = [item.name for item in fields(SetScores)]
    of_tests = [item.name for item in fields(PairedTest)]
    published: list[Sequence[object]] = [
        [model, site, PUBLISHED_CASES[site], *numbers]
        for model, sites in PUBLISHED.items()
        for site, numbers in sites.items()
    ]
    return {
        "cases.csv": csv_table(
            [*_PLACE, *SCORE_COLUMNS], [[*place, *astuple(score)] for place, one in each for score in one.scores]
        ),
        "cross_site.csv": csv_table(
            [*_PLACE, *of_sets],
            [[*place, *astuple(found)] for place, one in each for found in summarise_sets(one.scores, one.challenge)],
        ),
        "tests.csv": csv_table(
            [*_PLACE, "site", "reference", "model", *of_tests],
            [
                [*place, site, reference, model, *astuple(test)]
                for place, sets in tests.items()
                for site, models in sets.items()
                for model, test in models.items()
            ],
        ),
        "folds.csv": csv_table(
            [*_PLACE, "label", "fold", *of_sets],
            [[*place, label, fold, *astuple(found)] for place, one in each for label, fold, found in fold_rows(one)],
        ),
        "published.csv": csv_table(["model", "site", "n", "dice", "dice_sd"], published),
        "costs.csv": costs_csv(study.outcomes),
    }
