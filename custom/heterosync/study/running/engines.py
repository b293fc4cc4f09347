"""What carries out a run of a study: the engine of this process; FLARE's simulator is handed in by the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from heterosync.federation.modelfile import OWN_BEST
from heterosync.federation.runner import run_inprocess


@dataclass(frozen=True)
class Task:
    """A run as an engine sees it. sites: name -> site folder, all below `data`; work: the engine's own folder, where it
    finds what an interrupted session left."""

    method: str
    settings: Mapping[str, Any]
    training: Mapping[str, Any]
    sites: Mapping[str, Path]
    data: Path
    work: Path
    anchors_may_differ: bool = False


@dataclass(frozen=True)
class Trained:
    """Where a finished run left what. record: run.json and its like, with the models; predictions, own: site -> its
    predictions.csv, its own best model (where it has one)."""

    record: Path
    predictions: dict[str, Path]
    own: dict[str, Path] = field(default_factory=dict)


class Engine(Protocol):
    """Trains, validates and tests; called again for the same `work`, it goes on after the last finished round."""

    name: str

    def record(self, work: Path) -> Path:
        """The folder with the run.json of a run that is going on."""
        ...

    def train(self, task: Task, say: Callable[[str], None]) -> Trained:
        """Raises `UserError` with one readable cause."""
        ...


class InProcess:
    """All sites in this process, one after the other."""

    name = "inprocess"

    def record(self, work: Path) -> Path:
        return work

    def train(self, task: Task, say: Callable[[str], None]) -> Trained:
        def progress(event: dict[str, Any]) -> None:
            if event["event"] == "round":
                say(f"round {event['round'] + 1} done in {event['seconds']:.1f} s")

        run_inprocess(
            task.method,
            task.sites,
            task.work,
            task.settings,
            task.training,
            anchors_may_differ=task.anchors_may_differ,
            progress=progress,
        )
        sites = {site: task.work / "sites" / site for site in task.sites}
        own = {site: folder / OWN_BEST for site, folder in sites.items() if (folder / OWN_BEST).exists()}
        return Trained(task.work, {site: f / "results" / "predictions.csv" for site, f in sites.items()}, own)
