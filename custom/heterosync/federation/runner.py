"""A whole federation in one process: the oracle that every FLARE run must equal, and the quick engine of studies."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from heterosync.errors import HeteroSyncError, ProblemList
from heterosync.federation import checkin
from heterosync.federation.contribution import Contribution
from heterosync.federation.initial import initial_state, provisioned_at, state_hash
from heterosync.federation.modelfile import (
    BEST_MODEL,
    INITIAL_WEIGHTS,
    LAST_MODEL,
    keep_as_best,
    load_model,
    save_model,
)
from heterosync.federation.results import RUN, RunRecorder
from heterosync.federation.scoreboard import Scoreboard
from heterosync.federation.server import Server, assets_of, memory_of
from heterosync.federation.site import OWN_MODEL, SiteTrainer
from heterosync.federation.split import Ask, Exchange, together
from heterosync.federation.trainings import (
    Standing,
    begin_from,
    changed_ground,
    hold_run,
    learning_info,
    standing,
)
from heterosync.federation.wire import WirePolicy, payload_bytes
from heterosync.files import make_folder, read_json
from heterosync.methods import make_method
from heterosync.training.settings import LoopSettings

#: What trains in place of the sites where a method pools their images.
POOL = "pooled"

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
    validation: list[float | None] = field(default_factory=list)  # mean score of the models 0, 1, …, rounds
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
    resume: Path | str | None = None,
) -> RunSummary:
    """Train `method_name` over `sites` (name -> site folder), in site-name order, and write all results into `out`.

    Order: check-in; rounds of (each site receives and validates the global state, trains, returns its best snapshot;
    fusion); validation of the last fusion; test of the best and the last model, for personal methods of each site's
    own. A pooled method trains in one place on the images of all sites, and is tested at each. Run again on the same
    `out`, it goes on after the last finished round.

    resume: the folder of an earlier run, which stays as it is; a new `out` goes on with its training, as the next
    segment of a chain of jobs does. Sites may then join, and start from the global model, or leave (unless the method
    needs all of them).

    min_sites: sites needed at least; None means 2, or 1 for methods that combine nothing. stop: asked after every
    round with the number of finished rounds; True ends the run, which may go on later. progress: gets a dictionary with
    "event" ("site", "round", "test") and what belongs to it.

    Raises `UserError` for settings, site folders and an `out` that do not fit, before anything is trained; also when
    another process runs in `out`, or in the folder of the earlier run.
    """
    out, mine = Path(out), learning_info(method_name, method_settings, training)
    if resume is not None and not (out / RUN).exists():
        begin_from(Path(resume), out, mine, sorted(sites))
    with hold_run(make_folder(out)):
        run = _Run(method_name, sites, out, dict(method_settings or {}), dict(training or {}), progress)
        return run.play(anchors_may_differ, run.method.min_sites if min_sites is None else min_sites, stop)


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
        self.method = make_method(method, settings, training)
        self.training: LoopSettings = self.method.training
        self.shares = self.method.weighting != "none"
        self.out, self.tell = make_folder(out), progress or (lambda event: None)
        self.board = Scoreboard(self.training)
        self.metrics: dict[str, dict[str, dict[str, float]]] = {}
        self.info = {
            **learning_info(method, settings, training),
            "sites": sorted(sites),
            "engine": "inprocess",
        }
        self.labels: list[str] = []
        self.origin: dict[str, str] = {}
        self.stored = self._stands()
        self.done = self.stored.rounds
        work = self.out / "sites"
        self.testers = {
            name: SiteTrainer(name, sites[name], method, settings, training, work / name, log.info)
            for name in sorted(sites)
        }
        self.sites = self.testers  # those that train
        if self.method.pooled:
            self.sites = {POOL: SiteTrainer(POOL, sites, method, settings, training, work / POOL, log.info)}

    def play(self, anchors_may_differ: bool, min_sites: int, stop: Callable[[int], bool] | None) -> RunSummary:
        reports = {name: site.check_in() for name, site in self.sites.items()}
        receiving = checkin.receivers(reports) if self.method.one_model else []
        problems = checkin.compare(reports, anchors_may_differ, min_sites, receiving)
        first = next(iter(reports.values()))
        if self.done and not anchors_may_differ:
            problems += changed_ground(read_json(self.out / RUN), first)
        if problems:
            raise ProblemList(problems)
        self.sites = {name: site for name, site in self.sites.items() if name not in receiving}
        self.labels = first["labels"]
        self.info.update(receivers=receiving, labels=self.labels, anchor_digest=first["anchor_digest"])
        provisioned = provisioned_at(self.method, reports)
        self.info.update(provisioned)
        self.origin.update(provisioned)
        state = self._start()
        if self.server.tail is not None:
            self.server.tail.checked_in(reports)
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
            validation=[self.board.mean(model) for model in sorted(self.board.scores)] if self.shares else [],
            metrics=self.metrics,
        )

    # -- rounds --------------------------------------------------------------------------------------------------------

    def _rounds(self, state: dict[str, Tensor], stop: Callable[[int], bool] | None) -> tuple[dict[str, Tensor], str]:
        policy = WirePolicy(self.method.name, self.server.fusion.reference)
        while self.done < self.training.rounds and not self.board.should_stop:
            if stop is not None and stop(self.done):
                return state, "stopped: on request"
            round_, began = self.done, time.perf_counter()
            self.server.start(round_, state)
            metrics, payload = {}, {}
            exchanged: dict[str, int] = {}
            for name, contribution in self._trained(round_, state, exchanged):
                policy.check(contribution.tensors, contribution.metrics)
                self.server.accept(contribution)
                metrics[name] = contribution.metrics
                payload[name] = 0 if self.method.pooled else payload_bytes(contribution.tensors)
                payload[name] += exchanged.get(name, 0)
                self.recorder.site_done(round_, name, contribution.metrics)
                self.tell({"event": "site", "round": round_, "site": name, "metrics": contribution.metrics})
            received = self.method.task.received
            scores = {name: values.get(received) for name, values in metrics.items()}
            if self.shares and self.board.add(round_, scores):
                keep_as_best(self.out)
            state = self.server.result()
            seconds = time.perf_counter() - began
            # First the record, then the model: a run cut off in between repeats the round, with the same outcome.
            fusion = self.server.fusion
            self.recorder.round_done(round_, fusion.contributors, metrics, fusion.refused, seconds, payload)
            if self.shares:
                self._save(state, round_ + 1)
            self.done = round_ + 1
            mean = self.board.mean(round_)
            self.tell({"event": "round", "round": round_, "seconds": seconds, received: mean})
        return state, "completed"

    def _trained(
        self, round_: int, state: dict[str, Tensor], exchanged: dict[str, int]
    ) -> Iterator[tuple[str, Contribution]]:
        """Train the sites, one after the other or, where the network is cut, in step; `exchanged` gets its bytes."""
        tail = self.server.tail
        if tail is None:
            yield from ((name, site.train(round_, self.server.for_site(name))) for name, site in self.sites.items())
            return
        exchange, items = Exchange(list(self.sites), tail.answer), tail.items

        def part(site: SiteTrainer) -> Callable[[Ask], Contribution]:
            def train(ask: Ask) -> Contribution:
                site.exchange = ask
                return site.train(round_, state, items)

            return train

        done = together({name: part(site) for name, site in self.sites.items()}, exchange)
        exchanged.update(exchange.bytes)
        yield from done.items()

    def _evaluate(self, state: dict[str, Tensor]) -> None:
        if not self.shares:
            self._test(OWN_MODEL, lambda site: None)
            return
        metric = self.method.task.metric

        def last(site: str) -> dict[str, Tensor]:
            return self.server.for_site(site, state)

        scores = {
            name: site.validate(last(name), "validation", "last").get(metric) for name, site in self.sites.items()
        }
        self.recorder.validation(self.done, scores)
        if self.board.add(self.done, scores):
            keep_as_best(self.out)
        self.recorder.note(best_round=self.board.best, plateau_round=self.board.plateau)
        if self.method.personal:
            self._test(OWN_MODEL, lambda site: None)
        else:
            best = load_model(self.out / BEST_MODEL)
            self._test("best", lambda site: self.server.for_site(site, best.state, memory_of(best.assets)), best.round)
        self._test("last", last, self.done)

    def _test(self, model: str, state: Callable[[str], dict[str, Tensor] | None], rounds: int = 0) -> None:
        for name, site in self.testers.items():
            metrics = site.validate(state(name), "test", model, rounds)
            self.metrics.setdefault(model, {})[name] = metrics
            self.recorder.tested(model, name, metrics)
            self.tell({"event": "test", "model": model, "site": name, "metrics": metrics})

    # -- what is on disk -----------------------------------------------------------------------------------------------

    def _stands(self) -> Standing:
        """What `out` holds already; nothing for a new folder. Raises `UserError` when `out` is of another run."""
        return standing(self.out, self.info, self.shares, self.board) if (self.out / RUN).exists() else Standing()

    def _start(self) -> dict[str, Tensor]:
        """The global state to go on from, new or of an interrupted run, and the server."""
        if self.done:
            log.info("going on after %d rounds in %s", self.done, self.out)
        if not self.shares:
            self.server = Server(self.method, {})
            return {}
        if self.done and self.stored.model is not None:
            last = self.stored.model
            self.origin[INITIAL_WEIGHTS] = last.versions.get(INITIAL_WEIGHTS, "unknown")
            self.server = Server(self.method, last.state, memory_of(last.assets), sites=list(self.sites))
            return last.state
        state = initial_state(self.method)
        self.server = Server(self.method, state, sites=list(self.sites))
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
            assets_of(self.server.memory),
            self.origin,
        )
