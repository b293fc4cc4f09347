"""Every model on every test set, as Tables 3 and 4 of Sarma et al., JAMIA 2021, and its paired t-tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import ttest_rel

from heterosync.errors import UserError
from heterosync.federation.modelfile import ModelFile
from heterosync.study.table import ABSENT, text_table
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
#: Below this the paper marks a model as significantly lower than the federated one.
SIGNIFICANT = 0.001


@dataclass(frozen=True)
class CaseDice:
    """Dice of `model` on one test case of `site`."""

    model: str
    site: str
    case: str
    dice: float


@dataclass(frozen=True)
class PairedTest:
    """Federated minus private Dice over `n` cases that both segmented: mean, t and two-sided p."""

    n: int
    difference: float
    t: float
    p: float


def paired_tests(scores: Iterable[CaseDice], federated: str) -> dict[str, PairedTest]:
    """Two-sided paired t-test of every other model against `federated`, over all cases of `scores`.

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
        ours = np.array([reference[key] for key in sorted(reference)])
        theirs = np.array([cases[key] for key in sorted(reference)])
        same = np.array_equal(ours, theirs)  # no spread and no difference: scipy's t is not a number
        outcome = ttest_rel(ours, theirs)
        t, p = (0.0, 1.0) if same else (float(outcome.statistic), float(outcome.pvalue))
        found[model] = PairedTest(len(ours), float((ours - theirs).mean()), t, p)
    return found


def spread(dice: Sequence[float]) -> tuple[float, float] | None:
    """Mean and standard deviation (n - 1) as the tables print them; None without values."""
    if not dice:
        return None
    return float(np.mean(dice)), float(np.std(dice, ddof=1)) if len(dice) > 1 else 0.0


def cross_site_table(scores: Sequence[CaseDice], federated: str, challenge: Sequence[str] = ()) -> str:
    """Mean ± standard deviation of Dice by model and test site, over all of them, and on each `challenge` set apart.

    A star marks a model that is significantly lower than `federated` there (p < .001, two-sided paired t-test).
    """
    inside = [score for score in scores if score.site not in challenge]
    columns: dict[str, tuple[list[CaseDice], bool]] = {}  # scores, and whether the tests count there
    for site in sorted({score.site for score in inside}):
        columns[site] = [score for score in inside if score.site == site], False
    columns["Overall"] = inside, True
    for site in challenge:
        columns[site] = [score for score in scores if score.site == site], True
    models = sorted({score.model for score in scores}, key=lambda model: (model == federated, model))
    rows = [[model] for model in models]
    header = ["model"]
    for name, (chosen, tested) in columns.items():
        cases = {(score.site, score.case) for score in chosen}
        header.append(f"{name} (n={len(cases)})")
        lower = _lower(paired_tests(chosen, federated)) if tested and len(cases) > 1 else set()
        for row in rows:
            found = spread([score.dice for score in chosen if score.model == row[0]])
            star = "*" if row[0] in lower else ""
            row.append(f"{found[0]:.3f} ± {found[1]:.3f}{star}" if found else ABSENT)
    return text_table(header, rows)


def published_table() -> str:
    """Tables 3 and 4 as printed."""
    header = [next(iter(PUBLISHED.values()))][0]
    rows = []
    for model, cells in PUBLISHED.items():
        star = {"Overall": "*", "ProstateX": "*"} if model != "FL" else {}
        rows.append([model, *(f"{mean:.3f} ± {sd:.3f}{star.get(site, '')}" for site, (mean, sd) in cells.items())])
    return text_table(["model", *header], rows)


def score_ensemble(
    model: str,
    files: Sequence[ModelFile],
    sites: Mapping[str, Path | str],
    device: str = "cpu",
    split: str = "test",
) -> list[CaseDice]:
    """Dice of each case of `split` at each site, for the mean of the probabilities of `files` (one for each fold).

    Raises `UserError` for models that do not segment volumes, or that see them at other settings than the first.
    """
    import torch

    if not files:
        raise UserError(f"model {model}: an ensemble needs at least one model file")
    place, built = torch.device(device), [file.build() for file in files]
    method = built[0][0]
    for other, _ in built:
        alike = other.task is SEGMENTATION and all(
            getattr(other.training, name) == getattr(method.training, name) for name in ("spacing", "patch", "network")
        )
        if not alike:
            raise UserError(f"model {model}: its files are not alike: an ensemble averages one method's segmentations")
    found = []
    for site, folder in sorted(sites.items()):
        check_device(site, place)
        data = SEGMENTATION.load(folder, method.training, False, False)
        examples = VolumeExamples(method, data, site, place, "float32")
        outcome = examples.evaluate_ensemble([network.to(place) for _, network in built], split)
        found += [CaseDice(model, site, case.id, case.dice) for case in outcome.cases]
    return found


def _lower(tests: Mapping[str, PairedTest]) -> set[str]:
    return {model for model, test in tests.items() if test.p < SIGNIFICANT and test.difference > 0}
