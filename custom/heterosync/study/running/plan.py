"""What a study is made of: methods and their variants, scenarios, data, seeds; and the runs that follow from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

from heterosync.errors import UserError, nearest
from heterosync.methods import get_method, make_method
from heterosync.methods.base import Method
from heterosync.training import CLASSIFICATION, TrainingSettings

ENGINES = ("flare", "inprocess")
SYNTHETIC = "synthetic"
BOTH = "both"
#: What of a finished run can be kept beside its results. own: each site's own best model; workspace: everything.
KEEP = ("best", "last", "own", "workspace")
#: Variants that the switches `match_steps` and `balanced_sampler` add.
EQUAL_STEPS, UNBALANCED = "equal_steps", "unbalanced"
#: All runs of a study share one precision: what each run measured for itself would not be the same for all.
PRECISION = "float32"


@dataclass(frozen=True)
class MethodEntry:
    """A method with what differs from the defaults; `variant` tells apart two entries of one method."""

    method: str
    variant: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.method}-{self.variant}" if self.variant else self.method

    def made(self, training: Mapping[str, Any]) -> Method:
        """Raises `UserError` for unknown settings or bad values."""
        return make_method(self.method, self.settings, training)

    def with_variant(self, variant: str, **training: Any) -> MethodEntry:
        name = f"{self.variant}-{variant}" if self.variant else variant
        return MethodEntry(self.method, name, self.settings, {**self.training, **training})


class AnyPlan(Protocol):
    """What every plan has, whatever its methods learn. task: the name of that (training/task.py)."""

    task: ClassVar[str]

    @property
    def name(self) -> str: ...
    @property
    def methods(self) -> tuple[MethodEntry, ...]: ...
    @property
    def seeds(self) -> tuple[int, ...]: ...
    @property
    def engine(self) -> str: ...
    @property
    def keep(self) -> tuple[str, ...]: ...

    def where_from(self) -> str:
        """Where the data come from, in a word: "synthetic", or a place."""

    def ground(self, scenario: str) -> dict[str, Any]:
        """What the data of a scenario rest on, besides their seeds, as plain values."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as study.json keeps them."""


def of_another_task(entries: Iterable[MethodEntry], task: str) -> list[str]:
    """A line for each method that does not learn what its plan is for."""
    other = [(entry.method, get_method(entry.method).task.name) for entry in entries]
    return [
        f"method {method} learns {name}, and the plan's task is {task}: leave it out, or write task: {name}"
        for method, name in other
        if name != task
    ]


@dataclass(frozen=True)
class ScenarioEntry:
    """A scenario table (a name or the path of a CSV file). name: its folder; levels: None for all; methods: labels of
    those that run in it, None for all; scale, anchor: in place of the plan's; any_domain: as `data scenario`."""

    scenario: str
    name: str
    levels: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    scale: float | None = None
    anchor: dict[str, Any] | None = None
    any_domain: bool = False


@dataclass(frozen=True)
class Plan:
    """A study. source: {"kind": "synthetic", …} or {"kind": …, "path": …, labels and columns}; anchor: {"kind":
    "synthetic" | "pack" | "table" | "source", …}, None without anchor task; seeds: one per repeat, for the draw of the
    images, the splits and the training; group, unseen: as `data scenario`; base: what the plan's paths are relative
    to."""

    task: ClassVar[str] = CLASSIFICATION.name
    name: str
    methods: tuple[MethodEntry, ...]
    scenarios: tuple[ScenarioEntry, ...]
    source: dict[str, Any]
    anchor: dict[str, Any] | None
    seeds: tuple[int, ...]
    scale: float = 1.0
    training: dict[str, Any] = field(default_factory=dict)
    engine: str = "flare"
    match_steps: bool | str = False
    balanced_sampler: bool | str = True
    group: str = "patient"
    unseen: bool = True
    keep: tuple[str, ...] = ("best", "last")
    base: str = "."

    @property
    def synthetic(self) -> bool:
        return self.source["kind"] == SYNTHETIC

    def where_from(self) -> str:
        return SYNTHETIC if self.synthetic else str(self.source["path"])

    def ground(self, scenario: str) -> dict[str, Any]:
        values = self.to_dict()
        entry = {entry["name"]: entry for entry in values["scenarios"]}[scenario]
        own = {"scenario": entry["scenario"], "any_domain": entry["any_domain"]}
        own |= {name: values[name] if entry[name] is None else entry[name] for name in ("scale", "anchor")}
        return {**own, **{name: values[name] for name in ("source", "group", "unseen")}}

    def common(self) -> dict[str, Any]:
        """The training settings of all runs."""
        sampler = {"balanced_sampler": False} if self.balanced_sampler is False else {}
        return {"precision": PRECISION, **self.training, **sampler}

    def image_size(self) -> int:
        return TrainingSettings.from_dict(self.common()).image_size

    def methods_in(self, scenario: ScenarioEntry) -> list[MethodEntry]:
        """Those that run in a scenario, without the variants that the switches add."""
        return [entry for entry in self.methods if scenario.methods is None or entry.label in scenario.methods]

    def counts_steps(self, scenario: ScenarioEntry) -> bool:
        """Whether the switch `match_steps` changes anything there: methods with the anchor task have HSL's steps."""
        training = self.common()
        return bool(self.match_steps) and any(
            not entry.made({**training, **entry.training}).uses_anchor for entry in self.methods_in(scenario)
        )

    def entries(self, scenario: ScenarioEntry, hsl_items: int, pooled_items: int) -> Iterator[MethodEntry]:
        """Every method of a scenario, with the variants that the switches add.

        hsl_items: items of an HSL epoch at least, the size of the anchor set; pooled_items: items of the HSL epochs of
        all sites together, for methods that train in one place.
        """
        for entry in self.methods_in(scenario):
            made = entry.made({**self.common(), **entry.training})
            steps = {"match_steps": pooled_items if made.pooled else hsl_items}
            fewer = not made.uses_anchor  # those with the anchor task have these steps anyway
            if self.match_steps is True and fewer:
                entry = MethodEntry(entry.method, entry.variant, entry.settings, {**entry.training, **steps})
            yield entry
            if self.match_steps == BOTH and fewer:
                yield entry.with_variant(EQUAL_STEPS, **steps)
            if self.balanced_sampler == BOTH:
                yield entry.with_variant(UNBALANCED, balanced_sampler=False)

    def contradictions(self) -> list[str]:
        """One line for everything in the plan that does not go together."""
        try:
            TrainingSettings.from_dict(self.common())
        except UserError as error:
            return [str(error)]
        problems = of_another_task(self.methods, self.task)
        if problems:
            return problems
        problems = self._of_switches()
        labels = [entry.label for entry in self.methods]
        names = [entry.name for entry in self.scenarios]
        for what, values, mend in (
            ("method", labels, "give one of them a variant: …"),
            ("scenario", names, "give one of them a name: …"),
        ):
            problems += [f"{what} '{v}' is there twice: {mend}" for v in dict.fromkeys(values) if values.count(v) > 1]
        for scenario in self.scenarios:
            for label in scenario.methods or ():
                if label not in labels:
                    problems.append(f"scenario {scenario.name} runs method '{label}': {nearest(label, labels)}")
            if scenario.any_domain and self.synthetic:
                problems.append(f"scenario {scenario.name}: synthetic images have domains: leave out any_domain")
            if self.synthetic and (scenario.anchor or self.anchor or {}).get("sources"):
                line = f"scenario {scenario.name}: its anchor's sources would not be read, as the images are synthetic"
                problems.append(f"{line}: leave out sources")
        known = len(problems)
        for entry in self.methods:
            try:
                made = entry.made({**self.common(), **entry.training})
                if made.stand_in and "stand-in" not in entry.variant:
                    what = f"'{made.title}' must not pass for it in a table"
                    problems.append(f"method {entry.label}: {what}: give it variant: stand-in")
            except UserError as error:
                problems.append(f"method {entry.label}: {error}")
        return problems if len(problems) > known else problems + self._of_anchors()

    def _of_anchors(self) -> list[str]:
        problems = []
        for scenario in self.scenarios:
            if scenario.anchor or self.anchor:
                continue
            for entry in self.methods_in(scenario):
                if entry.made({**self.common(), **entry.training}).needs_anchor:
                    line = f"method {entry.label} needs an anchor pack, and scenario {scenario.name} has none"
                    problems.append(f"{line}: name an anchor pack with anchor: …, or write anchor: synthetic")
                    break
            if self.counts_steps(scenario):
                line = f"match_steps counts HSL's steps, and scenario {scenario.name} has no anchor"
                problems.append(f"{line}: name an anchor")
        return problems

    def _of_switches(self) -> list[str]:
        problems = []
        for entry in (MethodEntry("training", training=self.training), *self.methods):
            where = "training" if entry.method == "training" else f"method {entry.label}, training"
            if "seed" in entry.training:
                problems.append(f"{where}: the seed of a run is that of its repeat: leave out seed, or set seeds")
            if "match_steps" in entry.training and self.match_steps:
                problems.append(f"{where} sets match_steps, and so does the switch match_steps: leave one out")
            if "balanced_sampler" in entry.training and self.balanced_sampler is not True:
                problems.append(f"{where} sets balanced_sampler, and so does the switch of that name: leave one out")
            if entry.variant.split("-")[-1] in (EQUAL_STEPS, UNBALANCED):
                problems.append(f"method {entry.label}: the variant '{entry.variant}' is the name that a switch gives")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as study.json keeps them; `plan_of` reads them back."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values


def plan_of(values: Mapping[str, Any]) -> Plan:
    """The plan that `Plan.to_dict` wrote."""
    scenarios: list[dict[str, Any]] = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()} for entry in values["scenarios"]
    ]
    lists = {
        "methods": tuple(MethodEntry(**entry) for entry in values["methods"]),
        "scenarios": tuple(ScenarioEntry(**entry) for entry in scenarios),
        "seeds": tuple(values["seeds"]),
        "keep": tuple(values["keep"]),
    }
    return Plan(**{**values, **lists})


def digest_of(value: Any) -> str:
    """SHA-256 (hex) of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
