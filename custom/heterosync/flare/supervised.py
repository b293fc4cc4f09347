"""ScatterAndGather that asks for scalars, keeps to the sites that take part, and says why it stops."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather
from nvflare.fuel.utils.memory_utils import cleanup_memory

from heterosync.errors import HeteroSyncError
from heterosync.federation.wire import WirePolicy
from heterosync.flare import messages

CHECK_PERIOD = 0.05  # seconds
_COLLECT_PERIOD = 0.5  # seconds

log = logging.getLogger("heterosync")


class Stopped(HeteroSyncError):
    """The job cannot go on; the text says why, one line per cause."""


class SupervisedRounds(ScatterAndGather):
    """What a controller needs beside the rounds themselves; `HeteroSyncController` is the only one.

    policy: what scalars of a site must keep to. task_timeout: seconds that a question may take. rounds: as FLARE's.
    """

    def __init__(self, policy: WirePolicy, task_timeout: int, **rounds: Any):
        super().__init__(**rounds)
        self._policy, self._task_timeout = policy, task_timeout
        self._sites: list[str] = []  # those that take part: at first all, then those that passed the check-in
        self._stop_line = ""

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

    def broadcast_and_wait(self, task: Task, fl_ctx: FLContext, *args: Any, **options: Any) -> None:
        """As FLARE's, but only to the sites that take part, also for the training tasks of ScatterAndGather."""
        with _transfers_collected():
            super().broadcast_and_wait(task, fl_ctx, list(self._sites), *args, **options)

    def _process_train_result(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        self._guarded(fl_ctx, super()._process_train_result, client_task, fl_ctx)

    def _prepare_train_task_data(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        super()._prepare_train_task_data(client_task, fl_ctx)
        _send_without_copy(client_task, fl_ctx)

    def _ask(
        self, name: str, message: Shareable, what: str, signal: Signal, fl_ctx: FLContext, arrived: Any = None
    ) -> messages.Answers:
        """Send a task that is answered by scalars to the sites that take part; `arrived` as in `messages.Answers`."""
        answers = messages.Answers(name, self._sites, self._policy, arrived)

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
            before_task_sent_cb=_send_without_copy,
            result_received_cb=lambda client_task, fl_ctx: self._guarded(fl_ctx, take, client_task, fl_ctx),
        )
        wait = self._wait_time_after_min_received
        options = {"min_responses": self._min_clients, "wait_time_after_min_received": wait, "abort_signal": signal}
        self.broadcast_and_wait(task, fl_ctx, **options)
        answers.close()
        if signal.triggered:
            raise Stopped(f"{what}: aborted")
        for site in [site for site, reason in answers.failed.items() if reason == messages.NO_ANSWER]:
            self.log_warning(fl_ctx, f"{what}: site {site} failed: {messages.NO_ANSWER}")
        return answers

    def _lacking(self, answers: messages.Answers, what: str) -> list[str]:
        """The problem, naming who is missing, when too few sites answered; else nothing."""
        return [self._too_few(what, answers.failed)] if len(answers.good) < self._min_clients else []

    def _too_few(self, where: str, absent: Mapping[str, str]) -> str:
        why = "; ".join(f"site {site}: {reason}" for site, reason in sorted(absent.items())) or messages.NO_ANSWER
        return f"{where}: fewer than the {self._min_clients} sites that the job needs contribute: {why}"


def guarded(component: FLComponent, fl_ctx: FLContext, what: Callable[..., None], *args: Any) -> None:
    """`_guarded` for the server's other components; the controller puts the cause on record."""
    try:
        what(*args)
    except Exception as error:
        component.system_panic("; ".join(cause_of(error).splitlines()), fl_ctx)


def cause_of(error: Exception) -> str:
    """What is said of an error that ends the job; of one that nobody foresaw, the traceback goes into the log."""
    if isinstance(error, HeteroSyncError):
        return str(error)
    log.error("an unexpected error ends the job", exc_info=error)
    return f"{type(error).__name__}: {error}"


@contextmanager
def _transfers_collected() -> Iterator[None]:
    """Collect garbage while a task is out and after it, and give the memory back to the system.

    FLARE 2.9.0's finished transfers are cycles that hold the bytes sent: without this they pile up over the tasks.
    """
    done = threading.Event()

    def collect() -> None:
        while not done.wait(_COLLECT_PERIOD):
            cleanup_memory()

    thread = threading.Thread(target=collect, daemon=True)
    gc.freeze()  # what lives by now is set aside for the time being, which makes the collections quick
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        cleanup_memory()
        gc.unfreeze()


def _send_without_copy(client_task: ClientTask, fl_ctx: FLContext) -> None:
    """Keep FLARE from copying the model for every broadcast: nothing here ever changes a tensor in place."""
    task = client_task.task
    task._broadcast_data = task.data
