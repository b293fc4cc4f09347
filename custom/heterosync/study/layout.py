"""Where a study keeps what, under which names and columns: one place for the runner that writes it and for the report
that reads it.

    OUT/study.json                                        the expanded plan, its digest, versions
    OUT/data/<scenario>/<level>/r<repeat>/<site>/         site folders, written once and shared by the runs
    OUT/runs/<scenario>/<level>/r<repeat>/<label>/        one run: run_spec.json, results/, and done.json at its end
    OUT/report/                                           what `heterosync study report` writes
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from heterosync.data.tables import read_csv
from heterosync.errors import ProblemList, UserError
from heterosync.files import read_json, write_json, write_text
from heterosync.study.table import csv_table

STUDY, DATA, RUNS, REPORT = "study.json", "data", "runs", "report"
RESULTS, PREDICTIONS, RUN_SPEC, DONE, FAILED = "results", "predictions.csv", "run_spec.json", "done.json", "failed.json"
#: In the results of an ensemble of models on volumes: slices of its test cases, in a folder for each site.
VIEWS = "views"
#: In the folder of a run: what its engine works with, how far it is, and what it said.
WORK, PROGRESS, LOG = "work", "progress.json", "run.log"
#: Folder name of the level of a scenario that has none.
NO_LEVEL = "all"
#: The site that no other trains with; its rows of predictions.csv were scored by `GLOBAL` or by `own_model(site)`.
UNSEEN = "unseen"
GLOBAL = "best"
#: columns of predictions.csv
COLUMNS = ("site", "id", "patient", "label", "probability", "model")


@dataclass(frozen=True)
class RunSpec:
    """What one run is. level: folder name of the scenario's level (`NO_LEVEL`: it has none); repeat: from 0; variant:
    "" or what follows the method in `label`; settings: {"method": …, "training": …}, what differs from the defaults;
    digest: SHA-256 over all that decides on the result, data included (hex)."""

    scenario: str
    level: str
    repeat: int
    method: str
    variant: str
    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    def folder(self, study: Path | str) -> Path:
        return Path(study) / RUNS / self.path

    def data(self, study: Path | str) -> Path:
        """The folder with the site folders of the run, `unseen` beside them where the scenario has one."""
        return Path(study) / DATA / self.scenario / self.level / f"r{self.repeat}"

    @property
    def path(self) -> str:
        """Of the run's folder below `runs/`."""
        return f"{self.scenario}/{self.level}/r{self.repeat}/{self.label}"

    @property
    def name(self) -> str:
        """How a person calls the run."""
        level = "" if self.level == NO_LEVEL else f" {self.level}"
        return f"{self.scenario}{level} r{self.repeat} {self.label}"


@dataclass(frozen=True)
class Done:
    """The cost of a finished run. seconds: wall time of all its sessions; peak_memory_bytes: highest sum over the
    processes of the run at one moment (sampled); bytes_per_site_round: mean size of a contribution; engine: `flare` or
    `inprocess`; finished: ISO time, UTC; rows: of predictions.csv, None from versions that did not count them."""

    digest: str
    seconds: float
    peak_memory_bytes: int
    bytes_per_site_round: int
    engine: str
    finished: str
    rows: int | None = None


@dataclass(frozen=True)
class Prediction:
    """One test image scored by the model that speaks for the run; patient "" where it is not known; label 0 or 1."""

    site: str
    id: str
    patient: str
    label: int
    probability: float
    model: str


def own_model(site: str) -> str:
    """Value of the column `model` for a score by the own model of `site`."""
    return f"site:{site}"


def level_folder(level: str | None) -> str:
    return NO_LEVEL if level is None else level.replace(":", "-")


def write_spec(folder: Path | str, spec: RunSpec) -> Path:
    return write_json(Path(folder) / RUN_SPEC, asdict(spec))


def read_spec(folder: Path | str) -> RunSpec:
    """Raises `UserError` when run_spec.json is absent or damaged."""
    return _read(Path(folder) / RUN_SPEC, RunSpec)


def write_done(folder: Path | str, done: Done) -> Path:
    return write_json(Path(folder) / DONE, asdict(done))


def read_done(folder: Path | str) -> Done | None:
    """None when the run has not been finished. Raises `UserError` when done.json is damaged."""
    path = Path(folder) / DONE
    return _read(path, Done) if path.exists() else None


def write_predictions(results: Path | str, rows: Iterable[Prediction]) -> Path:
    """Write predictions.csv into the results folder of a run; probabilities keep every digit."""
    cells = [[getattr(row, column) for column in COLUMNS] for row in rows]
    return write_text(Path(results) / PREDICTIONS, csv_table(COLUMNS, cells))


def read_predictions(results: Path | str) -> list[Prediction]:
    """The rows of predictions.csv. Raises `UserError` when it is absent or no such table, `ProblemList` with every bad
    row."""
    path = Path(results) / PREDICTIONS
    table = read_csv(path)
    if tuple(table.header) != COLUMNS:
        raise UserError(f"{path}: the header must be {','.join(COLUMNS)}, not {','.join(table.header)}")
    rows, problems = [], []
    for (line, row), (_, values) in zip(table.records(), table.rows, strict=True):
        wrong = table.ragged(values) or _wrong(row)
        if wrong:
            problems.append(f"{path} line {line}: {wrong}")
        else:
            label, probability = int(row["label"]), float(row["probability"])
            rows.append(Prediction(row["site"], row["id"], row["patient"], label, probability, row["model"]))
    if problems:
        raise ProblemList(problems)
    return rows


def _wrong(row: dict[str, str]) -> str | None:
    if row["label"] not in ("0", "1"):
        return f"label '{row['label']}' must be 0 or 1"
    try:
        probability = float(row["probability"])
    except ValueError:
        probability = math.nan
    if not 0 <= probability <= 1:
        return f"probability '{row['probability']}' must be a number from 0 to 1"
    if not row["site"] or not row["id"] or not row["model"]:
        return "site, id and model must not be empty"
    return None


def _read(path: Path, kind: Any) -> Any:
    values = read_json(path)
    names = {item.name for item in fields(kind)}
    needed = {item.name for item in fields(kind) if item.default is MISSING}
    if not isinstance(values, dict) or not needed <= set(values) <= names:
        raise UserError(f"{path} does not hold {', '.join(sorted(names))}: restore it, or delete the run's folder")
    return kind(**values)
