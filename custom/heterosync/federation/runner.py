"""A whole federation in one process: the oracle that every FLARE run must equal, and the quick engine of studies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from heterosync.errors import HeteroSyncError, ProblemList, UserError
from heterosync.federation import checkin
from heterosync.federation.fusion import Fusion
from heterosync.federation.initial import initial_state, state_hash
from heterosync.federation.modelfile import INITIAL_WEIGHTS, keep_as_best, load_model, save_model
from heterosync.federation.results import RUN, RunRecorder, read_history
from heterosync.federation.scoreboard import Scoreboard
from heterosync.federation.site import OWN_MODEL, SiteTrainer, difference
from heterosync.federation.wire import WirePolicy, payload_bytes
from heterosync.files import make_folder, read_json
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings

LAST_MODEL, BEST_MODEL = "last_model.pt", "best_model.pt"

log = logging.getLogger("heterosync")


@dataclass(frozen=True)
class RunSummary:
    """How a run ended: `metrics` is model -> site -> test metrics; `best_round`, `validation` are of global models."""

    folder: Path
    method: str
    status: str
    rounds: int
    best_round: int | None = None
    plateau_round: int | None = None
    state_hash: str | None = None
    validation: list[float | None] = field(default_factory=list)  # mean AUC of the models 0, 1, …, rounds
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


def run_inprocess(
    method_name: str,
    sites: Mapping[str, Path | str],
    out: Path | str,
    method_settings: Mapping[str, Any] | None = None,
    training: Mapping[str, Any] | None = None,
    anchors_may_differ: bool = False,
    min_sites: int | None = None,
    stop: Callable[[int], bool] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> RunSummary:
    """Train `method_name` over `sites` (name -> site folder), in site-name order, and write all results into `out`.

    Order: check-in; rounds of (each site receives and validates the global state, trains, returns its best snapshot;
    fusion); validation of the last fusion; test of the best and the last model, for local methods of each site's own.
    Run again on the same `out`, it goes on after the last finished round.

    min_sites: sites needed at least; None means 2, or 1 for methods whose weights stay at home. stop: asked after every
    round with the number of finished rounds; True ends the run, which may go on later. progress: gets a dictionary with
    "event" ("site", "round", "test") and what belongs to it.

    Raises `UserError` for settings, site folders and an `out` that do not fit, before anything is trained.
    """
    run = _Run(method_name, sites, Path(out), dict(method_settings or {}), dict(training or {}), progress)
    if min_sites is None:
        min_sites = 2 if run.shares else 1
    return run.play(anchors_may_differ, min_sites, stop)


class _Run:
    def __init__(
        self,
        method: str,
        sites: Mapping[str, Path | str],
        out: Path,
        settings: dict[str, Any],
        training: dict[str, Any],
        progress: Callable[[dict[str, Any]], None] | None,
    ):
        self.training = TrainingSettings.from_dict(training)
        self.method = make_method(method, settings, self.training)
        self.shares = self.method.weighting != "none"
        self.out, self.tell = make_folder(out), progress or (lambda event: None)
        self.board = Scoreboard(self.training)
        self.metrics: dict[str, dict[str, dict[str, float]]] = {}
        self.info = {
            "method": method,
            "method_settings": self.method.settings.to_dict(),
            "training": self.training.to_dict(),
            "seed": self.training.seed,
            "sites": sorted(sites),
            "engine": "inprocess",
        }
        self.labels: list[str] = []
        self.origin: dict[str, str] = {}
        self.done = self._finished_rounds()
        work = self.out / "sites"
        self.sites = {
            name: SiteTrainer(name, sites[name], method, settings, training, work / name, log.info)
            for name in sorted(sites)
        }

    def play(self, anchors_may_differ: bool, min_sites: int, stop: Callable[[int], bool] | None) -> RunSummary:
        reports = {name: site.check_in() for name, site in self.sites.items()}
        problems = checkin.compare(reports, anchors_may_differ, min_sites)
        if problems:
            raise ProblemList(problems)
        first = next(iter(reports.values()))
        self.labels = first["labels"]
        self.info.update(labels=self.labels, anchor_digest=first["anchor_digest"])
        state = self._state()
        self.recorder = RunRecorder(self.out, self.info, self.done)
        self.recorder.checked_in(reports)
        try:
            state, status = self._rounds(state, stop)
            if status == "completed":
                self._evaluate(state)
        except BaseException as error:
            self.recorder.finish(f"failed: {error}" if isinstance(error, HeteroSyncError) else f"failed: {error!r}")
            raise
        self.recorder.finish(status)
        return RunSummary(
            folder=self.out,
            method=self.method.name,
            status=status,
            rounds=self.done,
            best_round=self.board.best,
            plateau_round=self.board.plateau,
            state_hash=state_hash(state) if state else None,
            validation=[self.board.mean(model) for model in sorted(self.board.aucs)] if self.shares else [],
            metrics=self.metrics,
        )

    # -- rounds --------------------------------------------------------------------------------------------------------

    def _rounds(self, state: dict[str, Tensor], stop: Callable[[int], bool] | None) -> tuple[dict[str, Tensor], str]:
        fusion = Fusion(state, self.method.weighting, self.method.name)
        policy = WirePolicy(self.method.name, state)
        while self.done < self.training.rounds and not self.board.should_stop:
            if stop is not None and stop(self.done):
                return state, "stopped: on request"
            round_, began = self.done, time.perf_counter()
            fusion.start(round_)
            metrics, payload = {}, {}
            for name, site in self.sites.items():
                contribution = site.train(round_, state)
                policy.check(contribution.tensors, contribution.metrics)
                fusion.accept(contribution)
                metrics[name], payload[name] = contribution.metrics, payload_bytes(contribution.tensors)
                self.recorder.site_done(round_, name, contribution.metrics)
                self.tell({"event": "site", "round": round_, "site": name, "metrics": contribution.metrics})
            aucs = {name: values.get("val_auc_received") for name, values in metrics.items()}
            if self.shares and self.board.add(round_, aucs):
                keep_as_best(self.out / LAST_MODEL, self.out / BEST_MODEL)
            state = fusion.result()
            seconds = time.perf_counter() - began
            # First the record, then the model: a run cut off in between repeats the round, with the same outcome.
            self.recorder.round_done(round_, fusion.contributors, metrics, fusion.refused, seconds, payload)
            if self.shares:
                self._save(state, round_ + 1)
            self.done = round_ + 1
            mean = self.board.mean(round_)
            self.tell({"event": "round", "round": round_, "seconds": seconds, "val_auc_received": mean})
        return state, "completed"

    def _evaluate(self, state: dict[str, Tensor]) -> None:
        if not self.shares:
            self._test(OWN_MODEL, None)
            return
        aucs = {name: site.validate(state, "validation", "last").get("auc") for name, site in self.sites.items()}
        self.recorder.validation(self.done, aucs)
        if self.board.add(self.done, aucs):
            keep_as_best(self.out / LAST_MODEL, self.out / BEST_MODEL)
        self.recorder.note(best_round=self.board.best, plateau_round=self.board.plateau)
        self._test("best", load_model(self.out / BEST_MODEL).state)
        self._test("last", state)

    def _test(self, model: str, state: dict[str, Tensor] | None) -> None:
        for name, site in self.sites.items():
            metrics = site.validate(state, "test", model)
            self.metrics.setdefault(model, {})[name] = metrics
            self.recorder.tested(model, name, metrics)
            self.tell({"event": "test", "model": model, "site": name, "metrics": metrics})

    # -- what is on disk -----------------------------------------------------------------------------------------------

    def _finished_rounds(self) -> int:
        """Rounds that `out` holds already; 0 for a new folder. Raises `UserError` when `out` is of another run."""
        if not (self.out / RUN).exists():
            return 0
        old = read_json(self.out / RUN)
        other = difference(self.info, {name: old.get(name) for name in self.info})
        if other:
            raise UserError(f"{self.out} holds a run with another {other}: choose another folder")
        if not self.shares:
            return len(old.get("rounds", []))
        if not (self.out / LAST_MODEL).exists():
            return 0
        done = load_model(self.out / LAST_MODEL, self.method.name).round
        received: dict[int, dict[str, float]] = {}
        for round_, site, metric, value in read_history(self.out):
            if metric == "val_auc_received" and round_ < done:
                received.setdefault(round_, {})[site] = value
        for round_ in sorted(received):
            self.board.add(round_, received[round_])
        return done

    def _state(self) -> dict[str, Tensor]:
        if self.done:
            log.info("going on after %d rounds in %s", self.done, self.out)
        if not self.shares:
            return {}
        if self.done:
            last = load_model(self.out / LAST_MODEL, self.method.name)
            self.origin = {INITIAL_WEIGHTS: last.versions.get(INITIAL_WEIGHTS, "unknown")}
            return last.state
        state = initial_state(self.method)
        self._save(state, 0)
        return state

    def _save(self, state: dict[str, Tensor], round_: int) -> None:
        """`last_model.pt`: the model after `round_` rounds. It is also where an interrupted run goes on."""
        save_model(
            self.out / LAST_MODEL,
            self.method.name,
            self.method.settings,
            self.training,
            state,
            self.labels,
            round_,
            versions=self.origin,
        )
