"""The tables on the page of a study on volumes, beside the cross-site table."""

from __future__ import annotations

from collections.abc import Mapping

from heterosync.study.evidence.cross_site import PairedTest, dice_in_words, summarise_sets
from heterosync.study.evidence.volume_outcomes import CrossValidation
from heterosync.study.evidence.volume_tables import fold_rows
from heterosync.study.pages import html
from heterosync.study.table import ABSENT, number


def measure_table(validation: CrossValidation) -> str:
    """Surface distance and volume of every model on every test set."""
    rows = [
        [one.model, one.site, one.n, dice_in_words(one.dice, one.dice_sd), number(one.hd95, 1)]
        + [number(one.volume_error, 1), one.n_missed]
        for one in summarise_sets(validation.scores, validation.challenge)
    ]
    header = ["model", "test set", "cases", "Dice", "95 % Hausdorff (mm)", "volume error (ml)", "nothing found"]
    caption = (
        "95 % Hausdorff: distance of the surfaces, mean over the cases in which something was found; volume error: "
        "mean of the absolute differences; nothing found: in how many cases."
    )
    return html.table(header, rows, caption, names=2)


def test_table(tests: Mapping[str, Mapping[str, PairedTest]], reference: str) -> str:
    """Every model against the reference."""
    rows = [
        [site, model, test.n, f"{test.difference:+.3f}", f"{test.t:.2f}", p_in_words(test.p)]
        for site, models in tests.items()
        for model, test in models.items()
    ]
    header = ["test set", "model", "cases", "mean difference in Dice", "t", "p"]
    caption = (
        f"{reference} minus the model, case by case; two-sided paired t-test, not corrected for the number of tests. "
        "Cases count as independent: the test knows nothing of another training run or other folds. t is inf where all "
        "cases differ by the same."
    )
    return html.table(header, rows, caption, names=2)


def fold_table(validation: CrossValidation) -> str:
    """Every submodel on the test sets where its own run tested it."""
    folds = list(dict.fromkeys(one.part for one in validation.submodels))
    found: dict[tuple[str, str], dict[str, str]] = {}
    for _, fold, one in fold_rows(validation):
        found.setdefault((one.model, one.site), {})[fold] = dice_in_words(one.dice, one.dice_sd)
    rows = [[*place, *(cells.get(fold, ABSENT) for fold in folds)] for place, cells in found.items()]
    caption = "Dice of each submodel before it joins the ensemble: a private one at home, a shared one at all sites."
    return html.table(["model", "test set", *folds], rows, caption, names=2)


def p_in_words(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
