"""What a study on volumes is made of: methods that segment, and folds that all of them share (Sarma et al. 2021)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from heterosync.data.scenario_tables import UNSEEN
from heterosync.data.volume_folds import sizes
from heterosync.errors import UserError, nearest
from heterosync.federation.wire import is_site_name
from heterosync.methods import get_method
from heterosync.study.running.plan import PRECISION, SYNTHETIC, MethodEntry, of_another_task
from heterosync.training import SEGMENTATION

#: Where the volumes come from, and what the one scenario of such a study is called.
PHANTOMS, SITES = "phantoms", "sites"
#: What of a finished run can be kept beside its results and the models that the ensemble is made of.
KEEP = ("last", "workspace")
#: Variants that a plan adds to every method: one submodel per fold, and what they are together.
FOLD, ENSEMBLE = "fold", "ensemble"
#: In a plan, `weights: {from: LABEL}` is the best model of the method LABEL in the same fold; in the settings of a run
#: it is the path of the run that makes it.
FROM = "from"
#: Of the plan's training settings, those that a method which goes on from a trained model does not take over.
BEGINNERS = ("lr", "rounds")
#: Settings that a model has in common with the one that it goes on from.
SHARED = ("network", "psp_blocks", "spacing", "interpolation")


@dataclass(frozen=True)
class VolumePlan:
    """A cross-validation. source: {"kind": "phantoms", "cases": …, "field_of_view": mm} or {"kind": "sites", "sites":
    {name: folder}, "challenge": folder or None}; folds: of the training cases of every site, each of which validates
    once; seeds: one per repeat of the whole, for the training and for phantoms; base: what its paths are relative
    to."""

    task: ClassVar[str] = SEGMENTATION.name
    name: str
    methods: tuple[MethodEntry, ...]
    source: dict[str, Any]
    seeds: tuple[int, ...]
    folds: int = 5
    training: dict[str, Any] = field(default_factory=dict)
    engine: str = "flare"
    keep: tuple[str, ...] = ()
    base: str = "."

    @property
    def synthetic(self) -> bool:
        return bool(self.source["kind"] == PHANTOMS)

    def where_from(self) -> str:
        return SYNTHETIC if self.synthetic else ", ".join(self.source["sites"].values())

    def ground(self, scenario: str) -> dict[str, Any]:
        values = self.to_dict()
        return {name: values[name] for name in ("source", "folds")}

    def folders(self) -> dict[str, Path]:
        """Site -> site folder, of volumes that are there already; the challenge set is the site `unseen`."""
        if self.synthetic:
            return {}
        challenge = {UNSEEN: self.source["challenge"]} if self.source["challenge"] else {}
        return {name: Path(self.base) / path for name, path in {**self.source["sites"], **challenge}.items()}

    def training_of(self, entry: MethodEntry, seed: int, fold: int) -> dict[str, Any]:
        """The training settings of a submodel; of all submodels but for its fold. A model that is yet to be trained is
        no part of them; a method that goes on from one has a rate and rounds of its own, whatever the plan's are."""
        unfit = BEGINNERS if get_method(entry.method).goes_on else ()
        common = {name: value for name, value in self.training.items() if name not in unfit}
        values = {"precision": PRECISION, **common, **entry.training, "seed": seed, "fold": fold}
        return {name: value for name, value in values.items() if name != "weights" or not source_of(entry)}

    def contradictions(self) -> list[str]:
        """One line for everything in the plan that does not go together."""
        problems = of_another_task(self.methods, self.task)
        if problems:
            return problems
        labels = [entry.label for entry in self.methods]
        twice = [label for label in dict.fromkeys(labels) if labels.count(label) > 1]
        problems += [f"method '{label}' is there twice: give one of them a variant: …" for label in twice]
        common = MethodEntry("training", training=self.training)
        for entry in (common, *self.methods):
            where = "training" if entry is common else f"method {entry.label}"
            weights = entry.training.get("weights", "")
            if "seed" in entry.training:
                problems.append(f"{where}: the seed of a run is that of its repeat: leave out seed, or set seeds")
            if "fold" in entry.training:
                problems.append(f"{where}: a plan runs every fold: leave out fold, or set folds")
            if not isinstance(weights, str) and (entry is common or source_of(entry) is None):
                line = "write a file, or {from: LABEL} in a method's own training"
                problems.append(f"{where}: weights is {weights!r}: {line}")
        problems += self._of_sites()
        if not problems:
            for entry in self.methods:
                try:
                    entry.made(self.training_of(entry, 0, 1))
                except UserError as error:
                    problems.append(f"method {entry.label}: {error}")
        return problems or [line for entry in self.methods for line in self._of_received(entry)]

    def _of_received(self, entry: MethodEntry) -> list[str]:
        """What is wrong with the model that a method goes on from: one file for all folds has trained on cases that
        validate in most of them."""
        name, where, known = source_of(entry), f"method {entry.label}", {one.label: one for one in self.methods}
        if name is None:
            if not get_method(entry.method).goes_on:
                return []
            line = "it goes on from a model, and each fold needs the one that was trained without its validation cases"
            return [f"{where}: {line}: write training: {{weights: {{from: LABEL}}}}, LABEL a method of this plan"]
        if name not in known:
            return [f"{where}: weights from '{name}': {nearest(name, known)}"]
        source = known[name]
        if source_of(source) or not source.made({}).one_model:
            return [f"{where}: weights from '{name}': take a method with one model for all sites, of its own beginning"]
        mine, other = (one.made(self.training_of(one, 0, 1)).training for one in (entry, source))
        unlike = [key for key in SHARED if getattr(mine, key) != getattr(other, key)]
        return [f"{where}: it has another {key} than {name}, whose model it goes on from" for key in unlike]

    def _of_sites(self) -> list[str]:
        if self.synthetic:
            from heterosync.data.volume_phantoms import FIELD_OF_VIEW

            cases, size = self.source["cases"], self.source["field_of_view"]
            if not FIELD_OF_VIEW[0] <= size <= FIELD_OF_VIEW[1]:
                return ["source, field_of_view is {:g} mm: choose {:g} to {:g}".format(size, *FIELD_OF_VIEW)]
            if min(sizes(cases, self.folds)):
                return []
            return [f"source: {cases} cases leave one of {self.folds} folds or the test set without a case: take more"]
        return [
            f"source: site '{name}': use letters, digits, '-', '_' and '.', and not '{UNSEEN}'"
            for name in self.source["sites"]
            if not is_site_name(name) or name == UNSEEN
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as study.json keeps them; `volume_plan_of` reads them back."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return {"task": self.task, **values}


def volume_plan_of(values: Mapping[str, Any]) -> VolumePlan:
    """The plan that `VolumePlan.to_dict` wrote."""
    given = {name: value for name, value in values.items() if name != "task"}
    lists = {name: tuple(values[name]) for name in ("seeds", "keep")}
    return VolumePlan(**{**given, **lists, "methods": tuple(MethodEntry(**entry) for entry in values["methods"])})


def source_of(entry: MethodEntry) -> str | None:
    """The label of the method whose model of the same fold an entry goes on from."""
    weights = entry.training.get("weights")
    return str(weights[FROM]) if isinstance(weights, Mapping) and set(weights) == {FROM} else None


def part_of(label: str) -> tuple[str, str]:
    """The method's label in a plan, and which part of its cross-validation a run is: `fold3`, or `ensemble`."""
    base, _, part = label.rpartition("-")
    return base, part
