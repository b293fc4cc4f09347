"""The server's side of a job: check-in, the rounds of FLARE's ScatterAndGather, the last validation, tests, records."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from heterosync.errors import HeteroSyncError, UserError
from heterosync.federation import checkin
from heterosync.federation.modelfile import load_model
from heterosync.federation.results import RunRecorder
from heterosync.federation.runner import BEST_MODEL
from heterosync.federation.scoreboard import Scoreboard
from heterosync.federation.site import OWN_MODEL
from heterosync.flare import messages
from heterosync.flare.persistor import LABELS, keep_as_best
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings

_CHECK_PERIOD = 0.05  # seconds

log = logging.getLogger("heterosync")


class Stopped(HeteroSyncError):
    """The job cannot go on; the text says why, one line per cause."""


class HeteroSyncController(ScatterAndGather):
    """ScatterAndGather with a check-in before it, the choice of the best model in it, and tests after it.

    method, method_settings, training: as in the executor; `training` also says how many rounds.
    min_clients: sites that a round needs; 0 means all that take part in the job. wait_time_after_min_received: seconds
    that a round waits for the others after that. train_timeout: seconds for a round of training, 0 without limit.
    task_timeout: the same for the check-in and every validation. anchors_may_differ: do not insist on equal anchors.
    uploads_to_disk: receive models into files, so that the memory of the server does not grow with the number of sites.

    A round that too few sites contribute to ends the job; the model of the round before stays as `last_model.pt`.
    """

    def __init__(
        self,
        method: str,
        method_settings: dict | None = None,
        training: dict | None = None,
        min_clients: int = 0,
        start_round: int = 0,
        wait_time_after_min_received: int = 600,
        train_timeout: int = 0,
        task_timeout: int = 3600,
        anchors_may_differ: bool = False,
        uploads_to_disk: bool = True,
    ):
        super().__init__(
            min_clients=max(1, min_clients),
            start_round=start_round,
            wait_time_after_min_received=wait_time_after_min_received,
            train_timeout=train_timeout,
            persistor_id="persistor",
            allow_empty_global_weights=True,  # methods whose weights stay at the sites
            task_check_period=_CHECK_PERIOD,
            snapshot_every_n_rounds=0,
            memory_gc_rounds=0,  # a full collection takes half a second and frees nothing: no cycle holds a tensor
            enable_tensor_disk_offload=uploads_to_disk,
        )
        self._method_name, self._settings, self._training = method, method_settings or {}, training or {}
        self._all_expected = min_clients == 0
        self._task_timeout = task_timeout
        self._anchors_may_differ = anchors_may_differ
        self._sites: list[str] = []
        self._failed: dict[str, str] = {}
        self._began = 0.0
        self._stop_line = ""

    # -- FLARE's life cycle --------------------------------------------------------------------------------------------

    def set_communicator(self, communicator: Any) -> None:
        super().set_communicator(communicator)
        communicator._task_check_period = _CHECK_PERIOD  # FLARE 2.9.0 sets another attribute than the one it reads

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Check every setting before any site is asked for anything."""
        self._folder = messages.run_folder(fl_ctx)
        try:
            training = TrainingSettings.from_dict(self._training)
            method = make_method(self._method_name, self._settings, training)
            self._num_rounds = training.rounds
            self._weights_leave = method.weighting != "none"
            self._scores = Scoreboard(training)
            info = {
                "method": method.name,
                "method_settings": method.settings.to_dict(),
                "training": training.to_dict(),
                "seed": training.seed,
                "engine": "flare",
                "job_id": fl_ctx.get_job_id(),
            }
            self._recorder = RunRecorder(self._folder, info)
            super().start_controller(fl_ctx)
        except UserError as error:
            self._stop(str(error), fl_ctx)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        status = "stopped: aborted"
        try:
            if not abort_signal.triggered:
                self._check_in(abort_signal, fl_ctx)
                super().control_flow(abort_signal, fl_ctx)
            if not abort_signal.triggered:
                self._finish(abort_signal, fl_ctx)
                status = "completed"
        except HeteroSyncError as error:
            if not abort_signal.triggered:
                self._stop(str(error), fl_ctx)
        finally:
            if self._stop_line:
                status = f"failed: {self._stop_line}"
            if hasattr(self, "_recorder"):
                self._recorder.finish(status)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.ROUND_STARTED:
            self._began, self._failed = time.monotonic(), {}
        elif event_type == AppEventType.BEFORE_AGGREGATION:
            self._before_fusion(fl_ctx)
        elif event_type == AppEventType.ROUND_DONE:
            self._after_fusion(fl_ctx)

    def _stop(self, text: str, fl_ctx: FLContext) -> None:
        """End the job with the lines of `text` as its cause."""
        if self._stop_line:
            return
        self._stop_line = "; ".join(text.splitlines())
        for line in text.splitlines():
            self.log_warning(fl_ctx, f"{messages.PROBLEM}{line}")
        self.system_panic(self._stop_line, fl_ctx)

    # -- before round 0 ------------------------------------------------------------------------------------------------

    def _check_in(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Ask every site what it has. Raises `Stopped` when too few answer or when they do not fit together."""
        self._sites = sorted(client.name for client in self._engine.get_clients())
        if self._all_expected:
            self._min_clients = len(self._sites)
        if self._min_clients > len(self._sites):
            here = ", ".join(self._sites)
            raise Stopped(f"{len(self._sites)} sites take part ({here}), the job's min_clients is {self._min_clients}")
        reports = self._ask(messages.CHECK_IN, messages.scalars_message({}), "the check-in", abort_signal, fl_ctx)
        least = max(self._min_clients, 2 if self._weights_leave else 1)
        problems = checkin.compare(reports, self._anchors_may_differ, min_sites=least)
        if problems:
            raise Stopped("\n".join(problems))
        first = reports[min(reports)]
        fl_ctx.set_prop(LABELS, tuple(first["labels"]), private=True, sticky=True)
        self._recorder.checked_in(reports)
        names = sorted(reports)
        self._recorder.note(sites=names, labels=first["labels"], anchor_digest=first.get("anchor_digest"))
        log.info("check-in: %d sites fit together: %s", len(names), ", ".join(names))

    # -- a round -------------------------------------------------------------------------------------------------------

    def _prepare_train_task_data(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        super()._prepare_train_task_data(client_task, fl_ctx)
        _send_without_copy(client_task, fl_ctx)

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        """Take a site's answer. A failed one is recorded with its reason; the job ends when too few sites remain."""
        failure = messages.failure_of(result)
        if failure is None:
            accepted = super()._accept_train_result(client_name, result, fl_ctx, is_unknown_task)
            if accepted:
                self._recorder.site_done(self._current_round, client_name, self.aggregator.metrics[client_name])
            return accepted
        self.log_warning(fl_ctx, f"round {self._current_round}: site {client_name} failed: {failure}")
        if not is_unknown_task:
            self._failed[client_name] = failure
            if len(self._sites) - len(self._failed) < self._min_clients:
                self._stop(self._too_few(f"round {self._current_round}", self._failed), fl_ctx)
        return False

    def _before_fusion(self, fl_ctx: FLContext) -> None:
        """Judge the model that was sent out, by the scores that came back, while its file is still the last one."""
        metrics = self.aggregator.metrics
        if len(metrics) < self._min_clients:
            self._stop(self._too_few(f"round {self._current_round}", self._absent()), fl_ctx)
            return
        if self._weights_leave:
            self._judge(self._current_round, {s: values.get("val_auc_received") for s, values in metrics.items()})

    def _after_fusion(self, fl_ctx: FLContext) -> None:
        metrics = self.aggregator.metrics
        seconds = time.monotonic() - self._began
        self._recorder.round_done(
            self._current_round, list(metrics), metrics, self._absent(), seconds, self.aggregator.payload
        )
        if self._scores.should_stop:
            log.info("early stop: the plateau rule fired at model %s", self._scores.plateau)
            self._num_rounds = self._current_round - self._start_round + 1

    def _judge(self, model: int, aucs: Mapping[str, float | None]) -> None:
        """Score the model after `model` rounds, which `last_model.pt` holds; keep it if it is the best so far."""
        if self._scores.add(model, aucs):
            keep_as_best(self._folder)

    def _absent(self) -> dict[str, str]:
        """Sites that did not contribute to the round, each with the reason."""
        known = {**self._failed, **self.aggregator.refused}
        missing = [site for site in self._sites if site not in self.aggregator.metrics]
        return {site: known.get(site, "no answer in time") for site in missing}

    def _too_few(self, where: str, absent: Mapping[str, str]) -> str:
        why = "; ".join(f"site {site}: {reason}" for site, reason in sorted(absent.items())) or "no answer in time"
        return f"{where}: fewer than the {self._min_clients} sites that the job needs contribute: {why}"

    # -- after the last round ------------------------------------------------------------------------------------------

    def _finish(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Score the last fusion, then test what is worth testing at every site."""
        if not self._weights_leave:
            self._test(OWN_MODEL, {}, abort_signal, fl_ctx)
            return
        last = self._global_weights[ModelLearnableKey.WEIGHTS]
        answers = self._validate("last", last, "validation", abort_signal, fl_ctx)
        aucs = {site: values.get("auc") for site, values in answers.items()}
        self._judge(self._current_round, aucs)
        self._recorder.validation(self._current_round, aucs)
        self._recorder.note(best_round=self._scores.best, plateau_round=self._scores.plateau)
        self._test("best", load_model(self._folder / BEST_MODEL).state, abort_signal, fl_ctx)
        self._test("last", last, abort_signal, fl_ctx)

    def _test(self, name: str, state: Mapping[str, Any], abort_signal: Signal, fl_ctx: FLContext) -> None:
        for site, metrics in sorted(self._validate(name, state, "test", abort_signal, fl_ctx).items()):
            self._recorder.tested(name, site, metrics)

    def _validate(
        self, name: str, state: Mapping[str, Any], split: str, abort_signal: Signal, fl_ctx: FLContext
    ) -> dict[str, dict[str, Any]]:
        message = messages.tensors_message(state)
        message.set_header(messages.SPLIT, split)
        message.set_header(messages.MODEL, name)
        return self._ask(messages.VALIDATE, message, f"the {split} of model '{name}'", abort_signal, fl_ctx)

    def _ask(
        self, task_name: str, message: Shareable, what: str, abort_signal: Signal, fl_ctx: FLContext
    ) -> dict[str, dict[str, Any]]:
        """Broadcast a task that is answered by scalars: site -> scalars. Raises `Stopped` when too few sites answer."""
        answers: dict[str, dict[str, Any]] = {}
        failed = {site: "no answer in time" for site in self._sites}

        def take(client_task: ClientTask, fl_ctx: FLContext) -> None:
            site, result = client_task.client.name, client_task.result
            failure = messages.failure_of(result)
            try:
                if failure is None:
                    answers[site] = messages.open_message(result)[1]
                    failed.pop(site, None)
                    return
            except HeteroSyncError as error:
                failure = str(error)
            failed[site] = failure
            self.log_warning(fl_ctx, f"{what}: site {site} failed: {failure}")

        task = Task(
            name=task_name,
            data=message,
            timeout=self._task_timeout,
            before_task_sent_cb=_send_without_copy,
            result_received_cb=take,
        )
        message.set_header(AppConstants.CURRENT_ROUND, self._current_round if self._current_round is not None else 0)
        self.broadcast_and_wait(task, fl_ctx, None, self._min_clients, self._wait_time_after_min_received, abort_signal)
        if abort_signal.triggered:
            raise Stopped(f"{what}: aborted")
        if len(answers) < self._min_clients:
            raise Stopped(self._too_few(what, failed))
        return answers


def _send_without_copy(client_task: ClientTask, fl_ctx: FLContext) -> None:
    """Keep FLARE from copying the model for every broadcast: nothing here ever changes a tensor in place."""
    task = client_task.task
    task._broadcast_data = task.data
