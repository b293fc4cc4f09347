"""One run of a study while it is carried out: what it is given, and what every kind of run does with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from heterosync.data.scenario import RECORD
from heterosync.federation.modelfile import BEST_MODEL, LAST_MODEL
from heterosync.federation.results import CROSS_SITE, HISTORY, RUN, TENSORBOARD
from heterosync.files import link_file, make_folder, read_json
from heterosync.study.layout import RESULTS, UNSEEN, WORK, RunSpec
from heterosync.study.running.engines import Engine, Task, Trained
from heterosync.study.running.plan import AnyPlan

#: Where each site's own best model is kept, below the results.
OWN = "own"


@dataclass(frozen=True)
class Cost:
    """engine: what did the work; bytes_per_site_round: mean size of a contribution; rows: of predictions.csv, None for
    runs that leave another table."""

    engine: str
    bytes_per_site_round: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class Job:
    """A run `spec` of the study in `study`, its folder, and the engine that trains."""

    study: Path
    plan: AnyPlan
    folder: Path
    spec: RunSpec
    engine: Engine
    say: Callable[[str], None]

    @property
    def work(self) -> Path:
        return (self.folder / WORK).absolute()

    @property
    def results(self) -> Path:
        return self.folder / RESULTS

    @property
    def data(self) -> Path:
        """The folder of the site folders."""
        return self.spec.data(self.study).absolute()

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """What was noted of the data."""
        found: Mapping[str, Any] = read_json(self.data / RECORD)
        return found

    @property
    def sites(self) -> dict[str, Path]:
        """Those that train, with their folders."""
        return {site: self.data / site for site in self.record["sites"] if site != UNSEEN}

    def train(self, **training: Any) -> Trained:
        """Let the engine train, and put the record of the run at its place. training: settings that hold on this
        machine alone."""
        trained = self.engine.train(
            Task(
                self.spec.method,
                self.spec.settings["method"],
                {**self.spec.settings["training"], **training},
                self.sites,
                self.data,
                self.work,
                anchors_may_differ=bool(self.record["anchors_differ"]),
            ),
            self.say,
        )
        make_folder(self.results)
        events = [path.relative_to(trained.record).as_posix() for path in (trained.record / TENSORBOARD).glob("*")]
        for name in (HISTORY, CROSS_SITE, RUN, BEST_MODEL, LAST_MODEL, *events):
            if (trained.record / name).exists():
                link_file(trained.record / name, self.results / name)  # models and curves: second names
        return trained

    def keep_own(self, trained: Trained) -> None:
        for site, path in trained.own.items():
            link_file(path, self.results / OWN / f"{site}.pt")

    def cost(self, rows: int | None = None) -> Cost:
        """Of the training, which left a table of so many rows."""
        run = read_json(self.results / RUN)
        sizes = [size for record in run.get("rounds", []) for size in record.get("bytes", {}).values()]
        return Cost(self.engine.name, round(sum(sizes) / len(sizes)) if sizes else 0, rows)
