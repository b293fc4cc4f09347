"""The server's side of a job: check-in, the rounds of FLARE's ScatterAndGather, the last validation, tests, records."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_event_type import AppEventType

from heterosync.federation import checkin
from heterosync.federation.modelfile import load_model
from heterosync.federation.results import RunRecorder
from heterosync.federation.runner import BEST_MODEL
from heterosync.federation.scoreboard import Scoreboard
from heterosync.federation.site import OWN_MODEL
from heterosync.federation.wire import WirePolicy
from heterosync.flare import messages
from heterosync.flare.persistor import LABELS, keep_as_best
from heterosync.flare.supervised import CHECK_PERIOD, Stopped, SupervisedRounds, cause_of
from heterosync.methods import make_method
from heterosync.training.settings import TrainingSettings

log = logging.getLogger("heterosync")


class HeteroSyncController(SupervisedRounds):
    """ScatterAndGather with a check-in before it, the choice of the best model in it, and tests after it.

    method, method_settings, training: as in the executor; `training` also says how many rounds.
    min_clients: sites that a round needs; 0 means all that take part in the job. wait_time_after_min_received: seconds
    that a round waits for the others after that. train_timeout: seconds for a round of training, 0 without limit.
    task_timeout: the same for the check-in and every validation. anchors_may_differ: do not insist on equal anchors.
    uploads_to_disk: receive models into files, so that the memory of the server does not grow with the number of sites.

    Only sites that pass the check-in take part. A round that too few of them contribute to ends the job; the model of
    the round before stays as `last_model.pt`.
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
    ):
        super().__init__(
            WirePolicy(method, {}),
            task_timeout,
            min_clients=max(1, min_clients),
            wait_time_after_min_received=wait_time_after_min_received,
            train_timeout=train_timeout,
            persistor_id="persistor",
            allow_empty_global_weights=True,  # methods whose weights stay at the sites
            task_check_period=CHECK_PERIOD,
            snapshot_every_n_rounds=0,
            memory_gc_rounds=0,  # `SupervisedRounds` collects while a task is out, when it matters
            enable_tensor_disk_offload=uploads_to_disk,
        )
        self._method_name, self._settings, self._training = method, method_settings or {}, training or {}
        self._all_expected = min_clients == 0
        self._anchors_may_differ = anchors_may_differ
        self._outside: dict[str, str] = {}  # who did not pass the check-in, and why
        self._failed: dict[str, str] = {}
        self._began = 0.0

    # -- FLARE's life cycle --------------------------------------------------------------------------------------------

    def start_controller(self, fl_ctx: FLContext) -> None:
        """Check every setting before any site is asked for anything."""
        self._folder = messages.run_folder(fl_ctx)
        try:
            messages.register_tensors()
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
        except Exception as error:
            self._stop(cause_of(error), fl_ctx)

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        status = "stopped: aborted"
        try:
            if not abort_signal.triggered:
                self._check_in(abort_signal, fl_ctx)
                super().control_flow(abort_signal, fl_ctx)
            if not abort_signal.triggered and not self._stop_line:
                self._finish(abort_signal, fl_ctx)
                status = "completed"
        except Exception as error:
            if not (abort_signal.triggered and isinstance(error, Stopped)):
                self._stop(cause_of(error), fl_ctx)
        finally:
            if self._stop_line:
                status = f"failed: {self._stop_line}"
            if hasattr(self, "_recorder"):
                self._guarded(fl_ctx, self._recorder.finish, status)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.ROUND_STARTED:
            self._began, self._failed = time.monotonic(), {}
        elif event_type == AppEventType.BEFORE_AGGREGATION:
            self._guarded(fl_ctx, self._before_fusion, fl_ctx)
        elif event_type == AppEventType.ROUND_DONE:
            self._guarded(fl_ctx, self._after_fusion)

    # -- before round 0 ------------------------------------------------------------------------------------------------

    def _check_in(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Ask every site what it has. Raises `Stopped` when too few answer or when they do not fit together."""
        self._sites = sorted(client.name for client in self._engine.get_clients())
        if self._all_expected:
            self._min_clients = len(self._sites)
        if self._min_clients > len(self._sites):
            here = ", ".join(self._sites)
            raise Stopped(f"{len(self._sites)} sites take part ({here}), the job's min_clients is {self._min_clients}")
        what = "the check-in"
        answers = self._ask(messages.CHECK_IN, messages.scalars_message({}), what, abort_signal, fl_ctx)
        problems = self._lacking(answers, what)
        if problems:
            raise Stopped("\n".join(problems))
        reports = answers.good
        least = max(self._min_clients, 2 if self._weights_leave else 1)
        problems = checkin.compare(reports, self._anchors_may_differ, min_sites=least)
        if problems:
            raise Stopped("\n".join(problems))
        first = reports[min(reports)]
        fl_ctx.set_prop(LABELS, tuple(first["labels"]), private=True, sticky=True)
        self._recorder.checked_in(reports)
        self._sites = names = sorted(reports)
        self._outside = answers.failed
        if self._outside:
            self._recorder.note(not_checked_in=self._outside)
        self._recorder.note(sites=names, labels=first["labels"], anchor_digest=first.get("anchor_digest"))
        log.info("check-in: %d sites fit together: %s", len(names), ", ".join(names))

    # -- a round -------------------------------------------------------------------------------------------------------

    def _accept_train_result(
        self, client_name: str, result: Shareable, fl_ctx: FLContext, is_unknown_task: bool = False
    ) -> bool:
        """Take a site's answer. A failed one is recorded with its reason; the job ends when too few sites remain."""
        if client_name not in self._sites:
            self.aggregator.refuse(client_name, "it did not pass the check-in", fl_ctx)
            return False
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
        self.aggregator.close()
        metrics = self.aggregator.metrics
        if len(metrics) < self._min_clients:
            self._stop(self._too_few(f"round {self._current_round}", self._absent()), fl_ctx)
            return
        if self._weights_leave:
            self._judge(self._current_round, {s: values.get("val_auc_received") for s, values in metrics.items()})

    def _after_fusion(self) -> None:
        metrics = self.aggregator.metrics
        seconds = time.monotonic() - self._began
        self._recorder.round_done(
            self._current_round, list(metrics), metrics, self._absent(), seconds, self.aggregator.payload
        )
        if self._scores.should_stop:
            log.info("early stop: the plateau rule fired at model %s", self._scores.plateau)
            self._num_rounds = self._current_round + 1

    def _judge(self, model: int, aucs: Mapping[str, float | None]) -> None:
        """Score the model after `model` rounds, which `last_model.pt` holds; keep it if it is the best so far."""
        if self._scores.add(model, aucs):
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
            models: dict[str, Callable[[], Mapping[str, Any]]] = {"last": self._last_state}
            if self._scores.best is not None:  # none when the only fusion of the job was not scored by enough sites
                models = {"best": lambda: load_model(self._folder / BEST_MODEL).state, **models}
            problems += self._test(models, abort_signal, fl_ctx)
        if problems:
            raise Stopped("\n".join(problems))

    def _last_state(self) -> Mapping[str, Any]:
        return self._global_weights[ModelLearnableKey.WEIGHTS]

    def _score_last_fusion(self, abort_signal: Signal, fl_ctx: FLContext) -> list[str]:
        """Let the last fusion compete for the best model, unless too few sites scored it; the problem then."""
        answers, what = self._validate("last", self._last_state(), "validation", abort_signal, fl_ctx)
        if answers.failed:
            self._recorder.note(not_validated=answers.failed)
        aucs = {site: values.get("auc") for site, values in answers.good.items()}
        problems = self._lacking(answers, what)
        if not problems:
            self._judge(self._current_round, aucs)
        self._recorder.validation(self._current_round, aucs)
        self._recorder.note(best_round=self._scores.best, plateau_round=self._scores.plateau)
        return problems

    def _test(
        self, models: Mapping[str, Callable[[], Mapping[str, Any]]], abort_signal: Signal, fl_ctx: FLContext
    ) -> list[str]:
        """Test one model after the other, each read when its turn comes; record what comes in, return the problems."""
        missing: dict[str, dict[str, str]] = {}
        problems: list[str] = []
        for name, state in models.items():
            record = partial(self._recorder.tested, name)
            answers, what = self._validate(name, state(), "test", abort_signal, fl_ctx, record)
            if answers.failed:
                missing[name] = answers.failed
                self._recorder.note(not_tested=missing)
            problems += self._lacking(answers, what)
        return problems

    def _validate(
        self, name: str, state: Mapping[str, Any], split: str, signal: Signal, fl_ctx: FLContext, arrived: Any = None
    ) -> tuple[messages.Answers, str]:
        message = messages.tensors_message(state)
        message.set_header(messages.SPLIT, split)
        message.set_header(messages.MODEL, name)
        what = f"the {split} of model '{name}'"
        return self._ask(messages.VALIDATE, message, what, signal, fl_ctx, arrived), what
