"""t-SNE maps of a study: its trained encoders, the images of its sites, and the numbers beside the pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from heterosync.errors import UserError
from heterosync.federation.modelfile import BEST_MODEL
from heterosync.study.evidence.features import POINTS, run_features, site_accuracy, site_mmd2, tsne
from heterosync.study.evidence.outcomes import Outcome
from heterosync.study.figures.embedding import Map, embeddings
from heterosync.study.layout import RESULTS
from heterosync.study.pages.by_scenario import Scenario
from heterosync.study.pages.drawings import Drawn

#: Methods whose encoders are shown: those of the paper, and averaging without any of HSL's parts.
SHOWN = ("hsl", "no_sat", "no_al", "fedavg")


@dataclass(frozen=True)
class MapNumbers:
    """What stands beside a map: cross-validated accuracy of guessing the site (`chance` by guessing blindly), and the
    mean squared MMD between sites. points: images per site."""

    scenario: str
    level: str
    repeat: int
    label: str
    stage: str
    sites: int
    points: int
    site_accuracy: float | None
    chance: float
    mmd2: float | None


def embedding_figure(
    scenario: Scenario, folder: Path, points: int = POINTS, seed: int = 0
) -> tuple[Drawn | None, list[MapNumbers], list[str]]:
    """The maps before and after training of one repeat at the last level; no figure where models or images are gone.

    Returns the figure, its numbers, and a line for every method that could not be shown.
    """
    level = scenario.levels[-1]
    maps: list[Map] = []
    numbers: list[MapNumbers] = []
    problems: list[str] = []
    for label, runs in scenario.series[level].items():
        if label not in SHOWN:
            continue
        one = runs[min(runs)]
        try:
            found = _maps_of(scenario, one, points, seed)
        except UserError as error:
            problems.append(f"t-SNE, {one.spec.name}: {str(error).splitlines()[0]}")
            continue
        maps += [map_ for map_, _ in found]
        numbers += [number for _, number in found]
    if not maps:
        return None, numbers, problems
    caption = (
        f"t-SNE of encoder 1's output for {numbers[0].points} test images of each site, fixed seed, repeat "
        f"r{numbers[0].repeat}{scenario.at_level(level)}. Distances and shapes in such a map "
        "mean little; the numbers come from the features themselves: how often a linear classifier guesses the site "
        "(cross-validated; chance in brackets) and the mean squared MMD between sites (0: one distribution). Sites "
        "that differ in their share of positives differ in both, however good the encoder is."
    )
    return Drawn(embeddings(maps, folder / f"{scenario.name}_tsne"), caption), numbers, problems


def _maps_of(scenario: Scenario, one: Outcome, points: int, seed: int) -> list[tuple[Map, MapNumbers]]:
    data = one.spec.data(scenario.study.folder)
    sites = [data / site for site in sorted(one.scores)]
    for site in sites:
        if not site.is_dir():
            raise UserError(f"the images of {site.name} are not there any more")
    model = one.folder / RESULTS / BEST_MODEL
    if not model.is_file():
        raise UserError("its model is not there any more")
    features = run_features(model, sites, points, seed)
    found = []
    for stage, rows in (("before training", features.before), ("after training", features.after)):
        accuracy, mmd2 = site_accuracy(rows, features.sites, seed), site_mmd2(rows, features.sites)
        chance = 1 / len(sites)
        told = "one site only" if accuracy is None else f"site guessed {accuracy:.2f} (chance {chance:.2f})"
        told += "" if mmd2 is None else f", MMD² {mmd2:.3f}"
        spec = one.spec
        place = (spec.scenario, spec.level, spec.repeat, spec.label, stage, len(sites), len(rows) // len(sites))
        number = MapNumbers(*place, accuracy, chance, mmd2)
        found.append((Map(f"{spec.label}, {stage}", told, tsne(rows, seed), features.sites), number))
    return found
