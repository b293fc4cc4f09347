"""Runs read back from their result files: run.json, history.csv, cross_site_metrics.json, and nothing
else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterosync.errors import UserError
from heterosync.federation.results import CROSS_SITE, HISTORY, MEAN, RUN, read_history
from heterosync.federation.trainings import STORE
from heterosync.files import read_json
from heterosync.methods import METHODS, Method
from heterosync.training import CLASSIFICATION, Task

#: Which of the tested models speaks for a run, the first that is there: the chosen fusion, each site's own, the last
#: fusion.
PREFERRED = ("best", "local", "last")


@dataclass(frozen=True)
class Run:
    """One run as far as it has come. `history`: (round, site, metric, value); `tests`: model -> site -> metrics."""

    label: str
    folder: Path
    info: dict[str, Any]
    history: list[tuple[int, str, str, float]]
    tests: dict[str, dict[str, dict[str, Any]]]

    @property
    def status(self) -> str:
        status = str(self.info.get("status", "unknown"))
        return "still going or broken off" if status == "running" else status

    @property
    def method(self) -> type[Method] | None:
        """What was trained; None where this version of heterosync does not know it."""
        return method_of(self.info)

    @property
    def rounds_done(self) -> int:
        return len(self.info.get("rounds") or [])

    @property
    def rounds_planned(self) -> int | None:
        return (self.info.get("training") or {}).get("rounds")

    @property
    def model(self) -> str | None:
        """The tested model that speaks for this run; None while nothing is tested."""
        return next((name for name in PREFERRED if self.tests.get(name)), next(iter(self.tests), None))

    @property
    def test_metrics(self) -> dict[str, dict[str, Any]]:
        """Site -> metrics of `model`."""
        return self.tests.get(self.model, {}) if self.model else {}

    @property
    def receivers(self) -> tuple[str, ...]:
        """Sites that took the model and trained nothing: no part of a mean over the sites."""
        return tuple(self.info.get("receivers") or ())

    @property
    def task(self) -> Task:
        """What it learned."""
        return task_of(self.info)

    @property
    def validation(self) -> dict[str, list[tuple[int, float]]]:
        """Site -> (rounds of training that the model had seen, validation score in the task's metric)."""
        curves: dict[str, list[tuple[int, float]]] = {}
        for round_, site, metric, value in self.history:
            if metric == self.task.received:
                curves.setdefault(site, []).append((round_, value))
        return {site: sorted(curves[site]) for site in sorted(curves)}

    @property
    def refused(self) -> list[str]:
        return [
            f"round {record['round'] + 1}: {site}: {reason}"
            for record in self.info.get("rounds") or []
            for site, reason in (record.get("refused") or {}).items()
        ]

    @property
    def absent(self) -> list[str]:
        """Rounds that went on without a site that took part in another round."""
        records = self.info.get("rounds") or []
        sites = {site for record in records for site in record["contributors"]}
        return [
            f"round {record['round'] + 1}: without {', '.join(missing)}"
            for record in records
            if (missing := sorted(sites - set(record["contributors"])))
        ]


def method_of(info: Mapping[str, Any]) -> type[Method] | None:
    """The method of the run that run.json tells of; None where this version of heterosync does not know it."""
    return next((method for method in METHODS if method.name == info.get("method")), None)


def task_of(info: Mapping[str, Any]) -> Task:
    """The task of the run that run.json tells of; classification for a method that this version does not know."""
    method = method_of(info)
    return CLASSIFICATION if method is None else method.task


def find_runs(path: Path | str) -> list[Path]:
    """The folder itself when it holds run.json, else every one below it that does. Raises `UserError` when there is
    none."""
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder: name a run folder or a simulator workspace")
    if (path / RUN).is_file():
        return [path]
    found = sorted(file.parent for file in path.rglob(RUN))
    # `heterosync simulate` copies the server's record to results/ when it ends: the server's own is the same or newer
    found = [folder for folder in found if not (folder.name == "results" and _of_server(folder.parent, found))]
    # the server's store of a training is a copy of the record of its last job
    of_jobs = {_training(folder) for folder in found if folder.parent.name != STORE}
    found = [folder for folder in found if folder.parent.name != STORE or folder.name not in of_jobs]
    if not found:
        raise UserError(f"{path} holds no {RUN}, here or below: has its run begun its first round?")
    return found


def _of_server(workspace: Path, found: Sequence[Path]) -> bool:
    return any(workspace / "server" in folder.parents for folder in found)


def _training(folder: Path) -> str | None:
    """The id of the training that this run is a part of."""
    info = read_json(folder / RUN)
    return info.get("training_id") if isinstance(info, dict) else None


def read_runs(paths: Sequence[Path | str]) -> list[Run]:
    """All runs of these folders, each with a label of its own (the method, with the folder's name where that is not
    enough)."""
    folders = [folder for path in paths for folder in find_runs(path)]
    infos = [read_json(folder / RUN) for folder in folders]
    for folder, info in zip(folders, infos, strict=True):
        if not isinstance(info, dict):
            raise UserError(f"{folder / RUN} is not the record of a run: restore it or leave this folder out")
    methods = [str(info.get("method", folder.name)) for folder, info in zip(folders, infos, strict=True)]
    runs = []
    for folder, info, method in zip(folders, infos, methods, strict=True):
        unique = methods.count(method) == 1
        label = method if unique else f"{method} ({_telling_name(folder, folders)})"
        runs.append(Run(label, folder, info, _history(folder), _tests(folder)))
    return runs


def _tests(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    tests = read_json(folder / CROSS_SITE) if (folder / CROSS_SITE).exists() else {}
    try:
        return {model: {site: dict(m) for site, m in sites.items() if site != MEAN} for model, sites in tests.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{folder / CROSS_SITE} is damaged: restore it, or delete the run and repeat it") from error


def _history(folder: Path) -> list[tuple[int, str, str, float]]:
    try:
        return read_history(folder)
    except ValueError as error:  # a cell that is not a number, a row of another length, bytes that are not text
        raise UserError(f"{folder / HISTORY} is damaged ({error}): delete it or restore it") from error


def _telling_name(folder: Path, folders: Sequence[Path]) -> str:
    """The first folder name from the end of the path that tells these runs apart."""
    parts = [other.resolve().parts[::-1] for other in folders]
    mine = folder.resolve().parts[::-1]
    for level, name in enumerate(mine):
        if sum(len(other) > level and other[level] == name for other in parts) == 1:
            return name
    return str(folder)
