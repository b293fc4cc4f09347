"""Which global model is the best, and whether its validation score has stopped rising (paper, Model development)."""

from __future__ import annotations

from collections.abc import Mapping

from heterosync.training.selection import Plateau
from heterosync.training.settings import LoopSettings


class Scoreboard:
    """Validation scores (AUC, Dice) of the global models 1, 2, …: model r is what r rounds made.

    Reconstruction of the paper's rules: the best model has the highest mean score over sites, ties go to the later one.
    Two models are compared over the sites that scored both, so that a site that was away does not tip the scales. The
    initial model 0 is recorded but never best. `plateau` is the model at which the plateau rule fired first.
    """

    def __init__(self, training: LoopSettings):
        self._plateau = Plateau(training.plateau_gain, training.plateau_count)
        self._early_stop = training.early_stop
        self.scores: dict[int, dict[str, float]] = {}
        self.best: int | None = None
        self.plateau: int | None = None

    def add(self, model: int, scores: Mapping[str, float | None]) -> bool:
        """Record the scores of `model` by site (None: undefined); True when it is now the best."""
        known = {site: float(value) for site, value in scores.items() if value is not None}
        self.scores[model] = known
        if model < 1:
            return False
        mean = self.mean(model)
        if mean is not None and self._plateau.update(mean) and self.plateau is None:
            self.plateau = model
        if self.best is None or self._not_worse(known, self.scores[self.best]):
            self.best = model
            return True
        return False

    def take_up(self, scores: Mapping[int, Mapping[str, float]], best: int | None) -> None:
        """Go on after models with these scores, of which `best` was kept: that file, not its score, decides, since a
        model can be scored anew, on other images or by other sites."""
        for model in sorted(scores):
            self.add(model, scores[model])
        if best is not None:
            self.best = best
            self.scores.setdefault(best, {})

    def mean(self, model: int) -> float | None:
        """Mean score of `model` over the sites that scored it; None when none did."""
        known = self.scores.get(model, {})
        return sum(known[site] for site in sorted(known)) / len(known) if known else None

    @property
    def should_stop(self) -> bool:
        """Whether early stopping is on and the plateau rule has fired."""
        return self._early_stop and self.plateau is not None

    @staticmethod
    def _not_worse(new: Mapping[str, float], old: Mapping[str, float]) -> bool:
        common = sorted(set(new) & set(old))
        if not common:
            return not old
        return sum(new[site] for site in common) >= sum(old[site] for site in common)
