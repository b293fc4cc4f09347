"""The server's side of a swarm job: the sites fuse among themselves, the server checks them in and keeps the record."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.ccwf.swarm_server_ctl import SwarmServerController

from heterosync.errors import UserError
from heterosync.flare import messages
from heterosync.flare.causes import Stopped, cause_of
from heterosync.flare.jobs.builder import obstacle
from heterosync.flare.supervised import CHECK_PERIOD, Supervision
from heterosync.methods import bytes_per_round

FOREVER = 10.0**9  # seconds

log = logging.getLogger("heterosync")


class SwarmController(Supervision, SwarmServerController):
    """FLARE's swarm with our check-in before it, the record of its rounds during it, and tests after it.

    No weight comes here. After every round the sites are asked for their scalars of it, and told which model is the
    best so far, so that they keep that one; the models themselves stay at the sites.

    method, method_settings, training, task_timeout, anchors_may_differ: as in `HeteroSyncController`. train_timeout:
    seconds without progress at any site that end the job, 0 without limit. silence: seconds after which a site that
    says nothing ends the job.

    Every site that takes part is needed in every round: FLARE's swarm has nobody who could tell late from lost.
    """

    hands_out = False

    def __init__(
        self,
        method: str,
        method_settings: dict | None = None,
        training: dict | None = None,
        train_timeout: int = 0,
        task_timeout: int = 3600,
        silence: int = 600,
        anchors_may_differ: bool = False,
    ):
        super().__init__(
            method,
            method_settings,
            training,
            0,
            0,
            task_timeout,
            anchors_may_differ,
            private_p2p=True,  # in secure mode the sites encrypt for each other, not for the server
            num_rounds=1,  # until `start_controller` has read the settings
            participating_clients=[],
            configure_task_timeout=task_timeout,
            start_task_timeout=task_timeout,
            task_check_period=CHECK_PERIOD,
            job_status_check_interval=0.2,
            max_status_report_interval=silence,
            progress_timeout=train_timeout + task_timeout if train_timeout else FOREVER,
        )
        self._recorded = 0  # rounds whose scalars are in
        self._began = 0.0

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Check every setting before any site is asked for anything."""
        try:
            training = self._prepare(fl_ctx)
            why = obstacle(self._rules, "topology")
            if why:
                raise UserError(f"no swarm: method {self._method_name} {why}")
            self.num_rounds = training.rounds
            self._bytes = bytes_per_round(self._rules, self._rules.build_model(weights="none"))
        except Exception as error:
            self._stop(cause_of(error), fl_ctx)

    def _take_up(self, info: dict[str, Any], fl_ctx: FLContext) -> int:
        info["topology"] = "swarm"
        return 0

    def _checked_in(self, reports: dict[str, dict[str, Any]]) -> None:
        if not self._rules.needs_provisioned:  # else the reports say that, and the head begins at random
            self._recorder.note(initial_weights=reports[min(reports)]["initial_weights"])

    def _begin(self, signal: Signal, fl_ctx: FLContext) -> None:
        """FLARE's swarm begins only now, with those that fit together."""
        self._signal, self.participating_clients = signal, list(self._sites)
        super().start_controller(fl_ctx)
        self._began = time.monotonic()

    def _check_job_status(self, fl_ctx: FLContext) -> bool:
        """FLARE asks this every moment of the swarm; a round is over once every site has begun the next one."""
        begun = [status.status.last_round for status in self.client_statuses.values()]
        if all(round_ is not None and round_ > self._recorded for round_ in begun):
            self._record_round(self._recorded, self._signal, fl_ctx)
        return super()._check_job_status(fl_ctx)

    def _record_round(self, round_: int, signal: Signal, fl_ctx: FLContext) -> None:
        """Ask for the scalars of a round; with them, judge the model that the sites received in it."""
        self._current_round = round_
        what = f"the report on round {round_}"
        metrics = self._enough(self._ask(messages.REPORT, self._question({}), what, signal, fl_ctx), what)
        self._scores.add(round_, {site: values.get(self._rules.task.received) for site, values in metrics.items()})
        for site in sorted(metrics):
            self._recorder.site_done(round_, site, metrics[site])
        now = time.monotonic()
        payload = dict.fromkeys(metrics, self._bytes)
        self._recorder.round_done(round_, list(metrics), metrics, None, now - self._began, payload)
        self._recorded, self._began = round_ + 1, now

    def _end(self, signal: Signal, fl_ctx: FLContext) -> str:
        """Take the reports that are missing, score the last fusion, test the best and the last model."""
        while self._recorded < self.num_rounds:
            self._record_round(self._recorded, signal, fl_ctx)
        self._current_round = self.num_rounds
        answers, what = self._validate("last", {}, "validation", signal, fl_ctx)
        metric = self._rules.task.metric
        scores = {site: values.get(metric) for site, values in self._enough(answers, what).items()}
        self._scores.add(self.num_rounds, scores)
        self._recorder.validation(self.num_rounds, scores)
        self._recorder.note(best_round=self._scores.best, plateau_round=self._scores.plateau)
        problems = self._test({"best": dict, "last": dict}, signal, fl_ctx)
        if problems:
            raise Stopped("\n".join(problems))
        return "completed"

    def _question(self, state: Mapping[str, Any]) -> Shareable:
        """A task without a model: the sites hold it, and learn here which one is the best so far."""
        assert not state, "the server of a swarm has no weights"
        message = messages.scalars_message({})
        message.set_header(messages.BEST, self._scores.best)
        return message
