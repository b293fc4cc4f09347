"""What every server-side workflow of ours does: check in, ask for scalars, test the models, and say why it stops."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.controller import Controller
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.fuel.utils.memory_utils import cleanup_memory

from heterosync.federation import checkin
from heterosync.federation.initial import provisioned_at
from heterosync.federation.results import RunRecorder
from heterosync.federation.scoreboard import Scoreboard
from heterosync.federation.trainings import learning_info
from heterosync.federation.wire import WirePolicy
from heterosync.flare import bounds, messages
from heterosync.flare.causes import Stopped, cause_of
from heterosync.flare.persistor import LABELS, ORIGIN
from heterosync.flare.sending import Payload, send
from heterosync.training.settings import LoopSettings

CHECK_PERIOD = 0.05  # seconds

log = logging.getLogger("heterosync")


class Supervision(Controller):
    """What the controllers share, whoever fuses; it stands before FLARE's own workflow among their bases.

    method, method_settings, training: as in the executor. min_clients: sites that the job needs, 0 for all that are
    there. wait: seconds that a question waits for the others once these have answered. task_timeout: seconds that a
    question may take. anchors_may_differ: do not insist on equal anchors. workflow: arguments of FLARE's workflow.

    hands_out: the server has the models, so that sites without training data can receive them.
    """

    hands_out = True

    def __init__(
        self,
        method: str,
        method_settings: dict | None,
        training: dict | None,
        min_clients: int,
        wait: int,
        task_timeout: int,
        anchors_may_differ: bool,
        **workflow: Any,
    ):
        super().__init__(**workflow)
        self._method_name, self._settings, self._training = method, method_settings or {}, training or {}
        self._policy, self._task_timeout = WirePolicy(method, {}), task_timeout
        self._min_clients, self._all_expected = max(1, min_clients), min_clients == 0
        self._wait_time_after_min_received = wait
        self._anchors_may_differ = anchors_may_differ
        self._current_round: Any = None  # None before the first round
        self._sites: list[str] = []  # those that train: at first all, then those that passed the check-in
        self._receivers: list[str] = []  # those without training data: they are asked for tests alone
        self._outside: dict[str, str] = {}  # who did not pass the check-in, and why
        self._stop_line = ""

    def _prepare(self, fl_ctx: FLContext) -> LoopSettings:
        """Check every setting and open the record of the run, before any site is asked for anything."""
        self._folder = messages.run_folder(fl_ctx)
        self._rules = bounds.job_method(self._method_name, self._settings, self._training, fl_ctx)
        training: LoopSettings = self._rules.training
        self._weights_leave = self._rules.weighting != "none"
        self._scores = Scoreboard(training)
        info = learning_info(self._method_name, self._settings, self._training)
        info.update(engine="flare", job_id=fl_ctx.get_job_id())
        rounds_done = self._take_up(info, fl_ctx)
        self._recorder = RunRecorder(self._folder, info, rounds_done)
        return training

    def _take_up(self, info: dict[str, Any], fl_ctx: FLContext) -> int:
        """Rounds that earlier jobs did of this job's training; may add to what run.json says of the job."""
        return 0

    def _changed(self, report: Mapping[str, Any], sites: list[str]) -> list[str]:
        """Problems of going on with the training of earlier jobs with these sites, of which one reports `report`."""
        return []

    def control_flow(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """The check-in, FLARE's own rounds, what is left to do after them; then the record of the run is closed."""
        status = "stopped: aborted"
        try:
            if not abort_signal.triggered:
                self._check_in(abort_signal, fl_ctx)
                self._begin(abort_signal, fl_ctx)
                super().control_flow(abort_signal, fl_ctx)
            if not abort_signal.triggered and not self._stop_line:
                status = self._end(abort_signal, fl_ctx)
        except Exception as error:
            if not (abort_signal.triggered and isinstance(error, Stopped)):
                self._stop(cause_of(error), fl_ctx)
        finally:
            if hasattr(self, "_recorder"):
                ended = f"failed: {self._stop_line}" if self._stop_line else status
                self._guarded(fl_ctx, self._recorder.finish, ended)
            self._leave(fl_ctx)

    def _begin(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        """Called between the check-in and the rounds."""

    @abstractmethod
    def _end(self, abort_signal: Signal, fl_ctx: FLContext) -> str:
        """What is done after the rounds; the status of the run. Raises `Stopped`."""

    def _leave(self, fl_ctx: FLContext) -> None:
        """Called last, however the job ended."""

    def _checked_in(self, reports: dict[str, dict[str, Any]]) -> None:
        """Called with what the sites said of themselves, once they fit together."""

    def set_communicator(self, communicator: Any) -> None:
        super().set_communicator(communicator)
        communicator._task_check_period = CHECK_PERIOD  # FLARE 2.9.0 sets another attribute than the one it reads

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == EventType.FATAL_SYSTEM_ERROR:  # our own `_stop`, or FLARE's word on what failed within it
            reason = str(fl_ctx.get_prop(FLContextKey.EVENT_DATA, "no reason given"))
            self._note_cause(reason, fl_ctx)
            # What we log is an event too and took its place; FLARE's own handler comes next and prints it.
            fl_ctx.set_prop(FLContextKey.EVENT_DATA, reason, private=True, sticky=False)

    def _guarded(self, fl_ctx: FLContext, what: Callable[..., None], *args: Any) -> None:
        """Call `what`; an exception stops the job. FLARE only logs those of event handlers and callbacks."""
        try:
            what(*args)
        except Exception as error:
            self._stop(cause_of(error), fl_ctx)

    def _stop(self, text: str, fl_ctx: FLContext) -> None:
        """End the job with the lines of `text` as its cause."""
        if not self._stop_line:
            self._note_cause(text, fl_ctx)
            self.system_panic(self._stop_line, fl_ctx)

    def _note_cause(self, text: str, fl_ctx: FLContext) -> None:
        if not self._stop_line:
            self._stop_line = "; ".join(text.splitlines())
            for line in text.splitlines():
                self.log_warning(fl_ctx, f"{messages.PROBLEM}{line}")

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
        reports = self._enough(answers, what)
        self._receivers = checkin.receivers(reports) if self.hands_out and self._rules.one_model else []
        if self._all_expected:
            self._min_clients = max(1, self._min_clients - len(self._receivers))
        least = max(self._min_clients, self._rules.min_sites)
        problems = checkin.compare(reports, self._anchors_may_differ, least, self._receivers)
        if self._rules.pooled and len(self._sites) > 1:
            problems.append(f"method '{self._rules.name}' is no federation: run it with one site that holds all images")
        first = reports[min(reports)]
        problems += self._changed(first, sorted(reports))
        if problems:
            raise Stopped("\n".join(problems))
        fl_ctx.set_prop(LABELS, tuple(first["labels"]), private=True, sticky=True)
        provisioned = provisioned_at(self._rules, reports)
        fl_ctx.set_prop(ORIGIN, provisioned, private=True, sticky=True)
        self._recorder.checked_in(reports)
        self._checked_in(reports)
        names = sorted(reports)
        self._sites = [name for name in names if name not in self._receivers]
        if self._rules.needs_all:
            self._min_clients = len(self._sites)
        self._outside = answers.failed
        if self._outside:
            self._recorder.note(not_checked_in=self._outside)
        fitting = {"sites": names, "receivers": self._receivers, "labels": first["labels"]}
        self._recorder.note(**fitting, anchor_digest=first.get("anchor_digest"), **provisioned)
        only = f"; without training data, only receiving: {', '.join(self._receivers)}" if self._receivers else ""
        log.info("check-in: %d sites fit together: %s%s", len(names), ", ".join(names), only)

    def broadcast_and_wait(self, *args: Any, **options: Any) -> None:
        """As FLARE's; after it the memory of the finished transfers, which are cycles in 2.9.0, is given back."""
        super().broadcast_and_wait(*args, **options)
        cleanup_memory()

    def _ask(
        self,
        name: str,
        message: Shareable,
        what: str,
        signal: Signal,
        fl_ctx: FLContext,
        arrived: Any = None,
        payload: Payload | None = None,
    ) -> messages.Answers:
        """Send a task that is answered by scalars, a test also to the receivers; `arrived` as in `messages.Answers`."""
        asked = self._sites + (self._receivers if message.get_header(messages.SPLIT) == "test" else [])
        answers = messages.Answers(name, asked, self._policy, arrived)

        def take(client_task: ClientTask, fl_ctx: FLContext) -> None:
            site = client_task.client.name
            failure = answers.take(site, client_task.result)
            if failure is not None:
                self.log_warning(fl_ctx, f"{what}: site {site} failed: {failure}")

        message.set_header(AppConstants.CURRENT_ROUND, self._current_round if self._current_round is not None else 0)
        task = Task(
            name=name,
            data=message,
            timeout=self._task_timeout,
            before_task_sent_cb=lambda client_task, fl_ctx: self._guarded(fl_ctx, send, client_task, payload),
            result_received_cb=lambda client_task, fl_ctx: self._guarded(fl_ctx, take, client_task, fl_ctx),
        )
        wait = self._wait_time_after_min_received
        options = {"min_responses": self._min_clients, "wait_time_after_min_received": wait, "abort_signal": signal}
        Supervision.broadcast_and_wait(self, task, fl_ctx, asked, **options)
        answers.close()
        if signal.triggered:
            raise Stopped(f"{what}: aborted")
        for site in [site for site, reason in answers.failed.items() if reason == messages.NO_ANSWER]:
            self.log_warning(fl_ctx, f"{what}: site {site} failed: {messages.NO_ANSWER}")
        return answers

    def _lacking(self, answers: messages.Answers, what: str) -> list[str]:
        """The problem, naming who is missing, when too few sites answered; else nothing."""
        answered = len(set(answers.good) - set(self._receivers))
        return [self._too_few(what, answers.failed)] if answered < self._min_clients else []

    def _enough(self, answers: messages.Answers, what: str) -> dict[str, dict[str, Any]]:
        """Site -> scalars. Raises `Stopped` when too few sites answered."""
        for problem in self._lacking(answers, what):
            raise Stopped(problem)
        return answers.good

    def _too_few(self, where: str, absent: Mapping[str, str]) -> str:
        why = "; ".join(f"site {site}: {reason}" for site, reason in sorted(absent.items())) or messages.NO_ANSWER
        return f"{where}: fewer than the {self._min_clients} sites that the job needs contribute: {why}"

    def _test(self, models: Mapping[str, Callable[[], Payload]], abort_signal: Signal, fl_ctx: FLContext) -> list[str]:
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
        self, name: str, model: Payload, split: str, signal: Signal, fl_ctx: FLContext, arrived: Any = None
    ) -> tuple[messages.Answers, str]:
        message = self._question({} if callable(model) else model)
        message.set_header(messages.SPLIT, split)
        message.set_header(messages.MODEL, name)
        message.set_header(messages.MADE_IN, self._scores.best if name == "best" else self._current_round)
        what = f"the {split} of model '{name}'"
        return self._ask(messages.VALIDATE, message, what, signal, fl_ctx, arrived, model), what

    def _question(self, state: Mapping[str, Any]) -> Shareable:
        """A task about a model that carries it along."""
        return messages.tensors_message(state)
