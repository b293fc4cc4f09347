"""Every model on every test set, as Tables 3 and 4 of Sarma et al., JAMIA 2021, and its paired t-tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from heterosync.errors import UserError
from heterosync.federation.modelfile import ModelFile
from heterosync.files import make_folder
from heterosync.study.ensemble import build_alike
from heterosync.study.evidence.statistics import PairedTest, paired_test
from heterosync.study.table import ABSENT, mean, text_table
from heterosync.training import SEGMENTATION
from heterosync.training.checks import check_device
from heterosync.training.segmentation import VolumeExamples

#: Printed mean and standard deviation of Dice: model -> test set (Tables 3 and 4; ProstateX is the challenge set).
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "NCI": {
        "NCI": (0.925, 0.016), "SUNY": (0.854, 0.050), "UCLA": (0.720, 0.165), "Overall": (0.833, 0.131),
        "ProstateX": (0.872, 0.062),
    },
    "SUNY": {
        "NCI": (0.887, 0.027), "SUNY": (0.906, 0.018), "UCLA": (0.768, 0.064), "Overall": (0.854, 0.074),
        "ProstateX": (0.838, 0.043),
    },
    "UCLA": {
        "NCI": (0.777, 0.102), "SUNY": (0.575, 0.177), "UCLA": (0.883, 0.069), "Overall": (0.745, 0.178),
        "ProstateX": (0.812, 0.136),
    },
    "FL": {
        "NCI": (0.920, 0.029), "SUNY": (0.880, 0.034), "UCLA": (0.885, 0.032), "Overall": (0.895, 0.036),
        "ProstateX": (0.889, 0.036),
    },
}  # fmt: skip
#: Test cases of each set there.
PUBLISHED_CASES = {"NCI": 20, "SUNY": 20, "UCLA": 20, "Overall": 60, "ProstateX": 343}
#: All test cases of the sites that train.
OVERALL = "Overall"
#: Below this the paper marks a model as significantly lower than the federated one.
SIGNIFICANT = 0.001


@dataclass(frozen=True)
class CaseDice:
    """Dice of `model` on one test case of `site`; hd95: 95 % Hausdorff distance in mm, None where nothing was found;
    volumes in ml, None where they are not known."""

    model: str
    site: str
    case: str
    dice: float
    hd95: float | None = None
    volume: float | None = None
    reference_volume: float | None = None

    @classmethod
    def of(cls, model: str, site: str, row: Mapping[str, str]) -> CaseDice:
        """A row of a site's predictions.csv."""
        distance = float(row["hd95"]) if row["hd95"] else None
        return cls(model, site, row["id"], float(row["dice"]), distance, *(float(row[name]) for name in _VOLUMES))

    @property
    def volume_error(self) -> float | None:
        """Absolute difference in ml."""
        if self.volume is None or self.reference_volume is None:
            return None
        return abs(self.volume - self.reference_volume)


_VOLUMES = ("volume", "reference_volume")
#: Columns of a table of such scores.
SCORE_COLUMNS = tuple(item.name for item in fields(CaseDice))


@dataclass(frozen=True)
class SetScores:
    """A model on a test set of `n` cases: mean and standard deviation (n - 1; None for one case) of Dice, mean of the
    95 % Hausdorff distances (mm) that are defined, mean of the absolute volume differences (ml), and in how many cases
    nothing was found."""

    model: str
    site: str
    n: int
    dice: float
    dice_sd: float | None
    hd95: float | None
    volume_error: float | None
    n_missed: int


def paired_tests(scores: Iterable[CaseDice], federated: str) -> dict[str, PairedTest]:
    """Two-sided paired t-test of `federated` against every other model, over all cases of `scores`: the federated Dice
    minus the other.

    Raises `UserError` where models were not scored on the same cases, at least two, each once.
    """
    by_model: dict[str, dict[tuple[str, str], float]] = {}
    for score in scores:
        cases, key = by_model.setdefault(score.model, {}), (score.site, score.case)
        if key in cases:
            raise UserError(f"model {score.model}: case {score.case} of {score.site} is scored twice: keep one score")
        cases[key] = score.dice
    if federated not in by_model:
        raise UserError(f"there is no score of the federated model '{federated}': test it on the same cases")
    reference, found = by_model.pop(federated), {}
    for model, cases in sorted(by_model.items()):
        if set(cases) != set(reference) or len(cases) < 2:
            raise UserError(
                f"models {model} and {federated} must be scored on the same cases, two or more, to be compared: "
                f"{len(cases)} and {len(reference)} cases, {len(set(cases) & set(reference))} of them the same"
            )
        ours, theirs = ([side[key] for key in sorted(reference)] for side in (reference, cases))
        found[model] = paired_test(ours, theirs)
    return found


def summarise_sets(scores: Sequence[CaseDice], challenge: Sequence[str] = ()) -> list[SetScores]:
    """Every model on every test set, model by model."""
    found = []
    for model in dict.fromkeys(score.model for score in scores):
        for site, chosen in sets_of(scores, challenge).items():
            mine = [score for score in chosen if score.model == model]
            if mine:
                dice = [score.dice for score in mine]
                spread = float(np.std(dice, ddof=1)) if len(dice) > 1 else None
                of_surface, of_volume = mean([one.hd95 for one in mine]), mean([one.volume_error for one in mine])
                missed = sum(one.volume == 0 for one in mine)
                found.append(
                    SetScores(model, site, len(mine), float(np.mean(dice)), spread, of_surface, of_volume, missed)
                )
    return found


def sets_of(scores: Iterable[CaseDice], challenge: Sequence[str] = ()) -> dict[str, list[CaseDice]]:
    """The scores by test site in the order of names, `OVERALL` on all of these sites, and on each `challenge` set."""
    scores = list(scores)
    inside = [score for score in scores if score.site not in challenge]
    by_site = {site: [one for one in inside if one.site == site] for site in sorted({one.site for one in inside})}
    apart = {site: [one for one in scores if one.site == site] for site in challenge}
    return {**by_site, OVERALL: inside, **{site: found for site, found in apart.items() if found}}


def tests_of(
    scores: Iterable[CaseDice], federated: str, challenge: Sequence[str] = ()
) -> dict[str, dict[str, PairedTest]]:
    """Test set -> model -> its t-test against `federated`, where the paper tests: overall and on the challenge set.
    Sets of a single case are left out: there is nothing to test."""
    sets = sets_of(scores, challenge)
    chosen = {site: found for site, found in sets.items() if site == OVERALL or site in challenge}
    return {
        site: paired_tests(found, federated)
        for site, found in chosen.items()
        if len({(score.site, score.case) for score in found}) > 1
    }


def cross_site_rows(
    scores: Sequence[CaseDice], federated: str, challenge: Sequence[str] = ()
) -> tuple[list[str], list[list[str]]]:
    """Mean ± standard deviation of Dice by model and test site, over all of them, and on each `challenge` set apart.

    A star marks a model that is significantly lower than `federated` there (p < .001, two-sided paired t-test).
    """
    sets, tests = sets_of(scores, challenge), tests_of(scores, federated, challenge)
    found = {(one.model, one.site): one for one in summarise_sets(scores, challenge)}
    header = ["model", *(f"{site} (n={len({(s.site, s.case) for s in chosen})})" for site, chosen in sets.items())]
    rows = []
    for model in sorted({model for model, _ in found}, key=lambda model: (model == federated, model)):
        row = [model]
        for site in sets:
            one, test = found.get((model, site)), tests.get(site, {}).get(model)
            star = "*" if test and test.p < SIGNIFICANT and test.difference > 0 else ""
            row.append(dice_in_words(one.dice, one.dice_sd) + star if one else ABSENT)
        rows.append(row)
    return header, rows


def cross_site_table(scores: Sequence[CaseDice], federated: str, challenge: Sequence[str] = ()) -> str:
    return text_table(*cross_site_rows(scores, federated, challenge))


def published_rows() -> tuple[list[str], list[list[str]]]:
    """Tables 3 and 4 as printed; a star as in `cross_site_rows`."""
    header = [next(iter(PUBLISHED.values()))][0]
    rows = []
    for model, cells in PUBLISHED.items():
        star = {OVERALL: "*", "ProstateX": "*"} if model != "FL" else {}
        rows.append([model, *(dice_in_words(*found) + star.get(site, "") for site, found in cells.items())])
    return ["model", *(f"{site} (n={PUBLISHED_CASES[site]})" for site in header)], rows


def published_table() -> str:
    return text_table(*published_rows())


def dice_in_words(dice: float, sd: float | None) -> str:
    return f"{dice:.3f}" + ("" if sd is None else f" ± {sd:.3f}")


def score_ensemble(
    model: str,
    files: Sequence[ModelFile],
    sites: Mapping[str, Path | str],
    device: str = "cpu",
    split: str = "test",
    keep: Path | None = None,
) -> list[CaseDice]:
    """Dice of each case of `split` at each site, for the mean of the probabilities of `files` (one for each fold).

    keep: a folder that gets what the task keeps of each case to look at, in a folder for each site.
    Raises `UserError` as `build_alike`.
    """
    import torch

    if not files:
        raise UserError(f"model {model}: an ensemble needs at least one model file")
    place, built = torch.device(device), build_alike(files)
    method = built[0][0]
    found = []
    for site, folder in sorted(sites.items()):
        check_device(site, place)
        data = SEGMENTATION.load(folder, method.training, False, False)
        examples = VolumeExamples(method, data, site, place, "float32")
        outcome = examples.evaluate_ensemble([network.to(place) for _, network in built], split)
        if keep is not None:
            outcome.keep(make_folder(keep / site), model)
        found += [
            CaseDice(model, site, case.id, case.dice, case.hd95, case.volume, case.reference_volume)
            for case in outcome.cases
        ]
    return found
