"""The server's side of a job: check-in, the rounds of FLARE's ScatterAndGather, the last validation, tests, records."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_event_type import AppEventType

from heterosync.federation.modelfile import BEST_MODEL, keep_as_best, load_model
from heterosync.federation.results import RUN
from heterosync.federation.server import memory_of
from heterosync.federation.site import OWN_MODEL
from heterosync.federation.trainings import (
    BEGUN_WITH,
    SEGMENT_DONE,
    SERVER,
    Standing,
    TrainingStore,
    changed_ground,
    changed_sites,
    standing,
    training_folder,
)
from heterosync.files import read_json
from heterosync.flare import bounds, messages
from heterosync.flare.causes import Stopped, cause_of
from heterosync.flare.persistor import STORED
from heterosync.flare.rounds import SupervisedRounds
from heterosync.flare.sending import Payload
from heterosync.flare.split import Desk
from heterosync.flare.supervised import CHECK_PERIOD

GONE = "no answer in two rounds running; not waited for in the rest of this job"

log = logging.getLogger("heterosync")


class HeteroSyncController(SupervisedRounds):
    """ScatterAndGather with a check-in before it, the choice of the best model in it, and tests after it.

    method, method_settings, training: as in the executor; `training` also says how many rounds.
    min_clients: sites that a round needs; 0 means all that take part in the job. wait_time_after_min_received: seconds
    that a round waits for the others after that. train_timeout: seconds for a round of training, 0 without limit.
    task_timeout: the same for the check-in and every validation. anchors_may_differ: do not insist on equal anchors.
    uploads_to_disk: receive models into files, so that the memory of the server does not grow with the number of sites.

    training_id: the training that this job goes on with (the id of its first job), "" to begin one; `training` then
    says how many rounds there are in all; only who began it, or a project admin, may go on with it. segment_rounds:
    rounds of this job, 0 for all that are left; the last model is scored and tested by the job that ends the training.

    Only sites that pass the check-in take part, in every job of a training anew. A round that too few of them
    contribute to ends the job; the model of the round before stays as `last_model.pt`. A site that does not answer in
    two rounds running is not waited for again in this job. Where the method makes one model for all, sites without
    training data only receive and test it; they do not count for `min_clients`.
    """

    def __init__(
        self,
        method: str,
        method_settings: dict | None = None,
        training: dict | None = None,
        min_clients: int = 0,
        wait_time_after_min_received: int = 600,
        train_timeout: int = 0,
        task_timeout: int = 3600,
        anchors_may_differ: bool = False,
        uploads_to_disk: bool = True,
        training_id: str = "",
        segment_rounds: int = 0,
    ):
        super().__init__(
            method,
            method_settings,
            training,
            min_clients,
            wait_time_after_min_received,
            task_timeout,
            anchors_may_differ,
            train_timeout=train_timeout,
            persistor_id="persistor",
            allow_empty_global_weights=True,  # methods whose weights stay at the sites
            task_check_period=CHECK_PERIOD,
            snapshot_every_n_rounds=0,
            memory_gc_rounds=0,  # `SupervisedRounds` collects during every task
            enable_tensor_disk_offload=uploads_to_disk,
        )
        self._training_id, self._segment_rounds = training_id, segment_rounds
        self._store: TrainingStore | None = None
        self._earlier: dict[str, Any] = {}  # run.json of the jobs before this one
        self._failed: dict[str, str] = {}
        self._silent: dict[str, int] = {}  # site -> rounds running without an answer
        self._gone: dict[str, str] = {}  # sites that are not waited for any more, and why
        self._began = 0.0
        self._desk: Desk | None = None  # where the sites meet in every step, when the network is cut

    # -- FLARE's life cycle --------------------------------------------------------------------------------------------

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Check every setting before any site is asked for anything."""
        try:
            messages.register_tensors()
            self._rounds = self._prepare(fl_ctx).rounds
            left = 0 if self._scores.should_stop else max(0, self._rounds - self._start_round)
            self._num_rounds = min(left, self._segment_rounds or left)
            super().start_controller(fl_ctx)
            if self._rules.split:
                self._desk = Desk(self._method_name, self._stop, self._task_timeout)
                fl_ctx.get_engine().register_aux_message_handler(messages.EXCHANGE, self._desk.answer)
            self._keep()
        except Exception as error:
            self._stop(cause_of(error), fl_ctx)

    def _end(self, abort_signal: Signal, fl_ctx: FLContext) -> str:
        if self._current_round < self._rounds and not self._scores.should_stop:
            self._recorder.note(best_round=self._scores.best)
            return SEGMENT_DONE
        self._finish(abort_signal, fl_ctx)
        return "completed"

    def _leave(self, fl_ctx: FLContext) -> None:
        if hasattr(self, "_recorder"):
            self._guarded(fl_ctx, self._keep)
        if self._store is not None:
            self._store.release()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.ROUND_STARTED:
            self._began, self._failed = time.monotonic(), {}
        elif event_type == AppEventType.BEFORE_AGGREGATION:
            self._guarded(fl_ctx, self._before_fusion, fl_ctx)
        elif event_type == AppEventType.ROUND_DONE:
            self._guarded(fl_ctx, self._after_fusion)
            self._guarded(fl_ctx, self._keep)
        elif event_type in (EventType.FATAL_SYSTEM_ERROR, EventType.ABORT_TASK, EventType.END_RUN) and self._desk:
            self._desk.close(self._stop_line or "the job ends")

    # -- the training that the job is a segment of ---------------------------------------------------------------------

    def _take_up(self, info: dict[str, Any], fl_ctx: FLContext) -> int:
        mine = {key: info[key] for key in ("method", "method_settings", "training")}
        name = self._training_id or str(info["job_id"])
        store = TrainingStore(training_folder(self._folder.parent, SERVER, name))
        store.hold(begin=not self._training_id, submitter=bounds.submitter_of(fl_ctx))
        self._store, stored = store, Standing()
        if self._training_id:
            stored = standing(store.folder, mine, self._weights_leave, self._scores, f"training '{name}'")
            self._earlier = read_json(store.folder / RUN)
            store.fetch(self._folder)
            info.update({key: self._earlier[key] for key in BEGUN_WITH if key in self._earlier})  # until the check-in
            log.info("training %s goes on after %d rounds", name, stored.rounds)
        segment = {"job_id": info["job_id"], "first_round": stored.rounds}
        info.update(training_id=name, segments=[*self._earlier.get("segments", []), segment])
        self._start_round = stored.rounds
        fl_ctx.set_prop(STORED, stored.model, private=True, sticky=False)
        return stored.rounds

    def _keep(self) -> None:
        """Store how far the training has come, where it outlives this job."""
        if self._store is not None:
            self._store.keep(self._folder)

    def _changed(self, report: Mapping[str, Any], sites: list[str]) -> list[str]:
        problems = []
        if self._start_round and not self._anchors_may_differ:
            problems += changed_ground(self._earlier, report)
        if self._start_round and self._rules.needs_all:
            problems += changed_sites(self._earlier, sites)
        return problems

    def _checked_in(self, reports: dict[str, dict[str, Any]]) -> None:
        self.aggregator.reports = {site: report for site, report in reports.items() if site not in self._receivers}

    # -- a round -------------------------------------------------------------------------------------------------------

    def _prepare_train_task_data(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        super()._prepare_train_task_data(client_task, fl_ctx)
        if self._desk is not None:
            items = self._desk.open(self._current_round, self._sites, self.aggregator.tail)
            client_task.task.data.set_header(messages.ITEMS, items)

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        """Take a site's answer. A failed one is recorded with its reason; the job ends when too few sites remain."""
        if client_name not in self._sites:
            self.aggregator.refuse(client_name, self._gone.get(client_name, "it did not pass the check-in"), fl_ctx)
            return False
        failure = messages.failure_of(result)
        if failure is None:
            accepted = super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task)
            if accepted:
                self._recorder.site_done(self._current_round, client_name, self.aggregator.metrics[client_name])
                if self._desk is not None:
                    self.aggregator.payload[client_name] += self._desk.leave(client_name)
            return accepted
        self.log_warning(fl_ctx, f"round {self._current_round}: site {client_name} failed: {failure}")
        if not is_unknown_task:
            self._failed[client_name] = failure
            if len(self._sites) - len(self._failed) < self._min_clients:
                self._stop(self._too_few(f"round {self._current_round}", self._failed), fl_ctx)
        return False

    def _before_fusion(self, fl_ctx: FLContext) -> None:
        """Judge the model that was sent out, by the scores that came back, while its file is still the last one."""
        self.aggregator.close()
        metrics = self.aggregator.metrics
        if len(metrics) < self._min_clients:
            self._stop(self._too_few(f"round {self._current_round}", self._absent()), fl_ctx)
            return
        if self._weights_leave:
            self._judge(
                self._current_round, {s: values.get(self._rules.task.received) for s, values in metrics.items()}
            )

    def _after_fusion(self) -> None:
        metrics = self.aggregator.metrics
        seconds = time.monotonic() - self._began
        self._recorder.round_done(
            self._current_round, list(metrics), metrics, self._absent(), seconds, self.aggregator.payload
        )
        if self._scores.should_stop:
            log.info("early stop: the plateau rule fired at model %s", self._scores.plateau)
            self._num_rounds = self._current_round + 1 - self._start_round
        self._wait_no_longer_for_the_silent()

    def _wait_no_longer_for_the_silent(self) -> None:
        """Leave out, for the rest of the job, who did not answer in two rounds running; the next segment asks again."""
        absent = self._absent()
        for site in list(self._sites):
            self._silent[site] = self._silent.get(site, 0) + 1 if absent.get(site) == messages.NO_ANSWER else 0
            if self._silent[site] == 2:
                self._gone[site] = self._outside[site] = GONE
                self._sites.remove(site)
                log.warning("site %s: %s", site, GONE)

    def _judge(self, model: int, scores: Mapping[str, float | None]) -> None:
        """Score the model after `model` rounds, which `last_model.pt` holds; keep it if it is the best so far."""
        if self._scores.add(model, scores):
            keep_as_best(self._folder)

    def _absent(self) -> dict[str, str]:
        """Sites that did not contribute to the round, each with the reason."""
        known = {**self._outside, **self._failed, **self.aggregator.refused}
        missing = {*self._sites, *known} - set(self.aggregator.metrics)
        return {site: known.get(site, messages.NO_ANSWER) for site in sorted(missing)}

    # -- after the last round ------------------------------------------------------------------------------------------

    def _finish(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Score the last fusion, then test what is worth testing at every site.

        Raises `Stopped` only after the tests, when too few sites answered to any of it: what can be known is recorded.
        """
        if not self._weights_leave:
            problems = self._test({OWN_MODEL: dict}, abort_signal, fl_ctx)
        else:
            problems = self._score_last_fusion(abort_signal, fl_ctx)
            models: dict[str, Callable[[], Payload]] = {"last": self._last_model}
            if self._rules.personal:
                models = {OWN_MODEL: dict, **models}
            elif self._scores.best is not None:  # none when the only fusion of the job was not scored by enough sites
                models = {"best": self._best_model, **models}
            problems += self._test(models, abort_signal, fl_ctx)
        if problems:
            raise Stopped("\n".join(problems))

    def _best_model(self) -> Payload:
        best = load_model(self._folder / BEST_MODEL)
        return self._model(best.state, memory_of(best.assets))

    def _score_last_fusion(self, abort_signal: Signal, fl_ctx: FLContext) -> list[str]:
        """Let the last fusion compete for the best model, unless too few sites scored it; the problem then."""
        answers, what = self._validate("last", self._last_model(), "validation", abort_signal, fl_ctx)
        if answers.failed:
            self._recorder.note(not_validated=answers.failed)
        scores = {site: values.get(self._rules.task.metric) for site, values in answers.good.items()}
        problems = self._lacking(answers, what)
        if not problems:
            self._judge(self._current_round, scores)
        self._recorder.validation(self._current_round, scores)
        self._recorder.note(best_round=self._scores.best, plateau_round=self._scores.plateau)
        return problems
