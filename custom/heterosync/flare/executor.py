"""The site's side of a job: hands each task to the trainer and its answer to the server."""

from __future__ import annotations

import os
import threading
import traceback
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants

from heterosync import pulse
from heterosync.data.site import find_site_folder
from heterosync.errors import TrainerDied, TrainerHung, UserError
from heterosync.federation.wire import reportable
from heterosync.flare import bounds, messages
from heterosync.flare.split import Ended, ask_server
from heterosync.methods import make_method

#: Name of the site's private setting for its site folder: a scope property in `local/privacy.json`. It is sent nowhere.
DATA_ROOT = "data_root"
WORK = "heterosync"


class HeteroSyncExecutor(Executor):
    """Supervises a trainer: a process of its own with a fixed command (never one that a job names), or in this process.

    A client job process that dies fails the whole job; a trainer that dies is started again and costs a repeated task,
    at worst its site one round. All state lies in the site's folder of the training (see `trainings`): any process of
    the same job can go on with it (the simulator starts one per task when it has fewer threads than clients), and so
    can a later job of the training. Test results go into `heterosync/results/` of the site's run folder.

    method: name of the method, for example "hsl". method_settings, training: what differs from their defaults.
    in_process: train inside this process; quicker to start, for tests and small simulations.
    training_id: the training that this job goes on with; "" begins one, under the id of the job. How often the site is
    asked about a model is limited, see `bounds`.

    Failures go into the site's log in full; the server only learns a reason out of `messages.REASONS`.
    """

    def __init__(
        self,
        method: str,
        method_settings: dict | None = None,
        training: dict | None = None,
        in_process: bool = False,
        training_id: str = "",
    ):
        super().__init__()
        self._method, self._settings, self._training = method, method_settings or {}, training or {}
        self._in_process, self._training_id = in_process, training_id
        self._trainer: Any = None
        self._lock = threading.Lock()
        self._problems: list[str] = []

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            messages.register_tensors()
            self.logger.info("site %s: %s", fl_ctx.get_identity_name(), messages.READY)
        elif event_type in (EventType.ABORT_TASK, EventType.END_RUN, EventType.SWAP_OUT):
            self._close()
        if event_type == EventType.END_RUN:
            for line in dict.fromkeys(self._problems):  # once more, below the server's last word
                self.logger.warning("%s%s", messages.PROBLEM, line)

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Answer one task. Never raises: FLARE would stream the traceback, with all it quotes, to the server."""
        try:
            round_ = shareable.get_header(AppConstants.CURRENT_ROUND)
            fl_ctx.set_prop(messages.ROUND, round_, private=True, sticky=False)
            reason = ""
            fl_ctx.set_prop(messages.TASK, shareable, private=True, sticky=False)
            if task_name in (messages.TRAIN, messages.VALIDATE):
                rounds = make_method(self._method, self._settings, self._training).training.rounds
                bounds.count_question(bounds.site_training(fl_ctx, self._training_id), rounds)
            for attempt in (1, 2):
                try:
                    trainer = self._get_trainer(fl_ctx)
                    trainer.abort = lambda: abort_signal.triggered  # kills a trainer process within a tenth of a second
                    trainer.exchange = ask_server(fl_ctx, abort_signal)
                    with pulse.until(lambda: abort_signal.triggered):  # where it trains in this process
                        return self._answer(trainer, task_name, shareable)
                except TrainerDied as death:
                    self._close()
                    if abort_signal.triggered:
                        return make_reply(ReturnCode.TASK_ABORTED)
                    reason = "hung" if isinstance(death, TrainerHung) else "died"
                    self.logger.warning("%s (%s)", death, "it starts again" if attempt == 1 else "no third attempt")
            site = fl_ctx.get_identity_name()
            self._say_here(f"site {site}: the trainer {reason} in task {task_name}, also when tried again")
            return messages.refusal(reason)
        except Ended as error:
            self.logger.warning("site %s: %s", fl_ctx.get_identity_name(), error)
            return messages.refusal("ended")
        except bounds.TooMany as error:
            self._say_here(f"site {fl_ctx.get_identity_name()}: {error}")
            return messages.refusal("limit")
        except UserError as error:
            for line in str(error).splitlines():
                self._say_here(line)
            return messages.refusal("mend")
        except Exception as error:
            if abort_signal.triggered:
                return make_reply(ReturnCode.TASK_ABORTED)
            site = fl_ctx.get_identity_name()
            self._say_here(f"site {site}: {type(error).__name__}: {error}", traceback.format_exc())
            return messages.refusal("defect")

    def _say_here(self, line: str, details: str = "") -> None:
        """Log a line that must stay here: no FLARE event, and not level ERROR, which is streamed to the server."""
        self._problems.append(line)
        self.logger.warning("%s%s%s", messages.PROBLEM, line, "\n" + details if details else "")

    def _answer(self, trainer: Any, task_name: str, task: Shareable) -> Shareable:
        if task_name == messages.CHECK_IN:
            return messages.scalars_message(trainer.check_in())
        if task_name == messages.TRAIN:
            shared, _ = messages.open_message(task)
            items = task.get_header(messages.ITEMS)
            options = {} if items is None else {"items": items}
            done = trainer.train(messages.round_of(task), shared, **options)
            fields = {"method": done.method, "round": done.round, "samples": done.samples}
            return messages.tensors_message(done.tensors, {**fields, "metrics": reportable(done.metrics)})
        if task_name == messages.VALIDATE:
            shared, _ = messages.open_message(task)
            asked = [task.get_header(name) for name in (messages.SPLIT, messages.MODEL, messages.MADE_IN)]
            return messages.scalars_message(reportable(trainer.validate(shared, *asked)))
        raise UserError(f"task '{task_name}' is not one of {', '.join(messages.TASKS)}")

    def _get_trainer(self, fl_ctx: FLContext) -> Any:
        with self._lock:
            if self._trainer is None:
                self._trainer = self._make_trainer(fl_ctx)
            return self._trainer

    def _make_trainer(self, fl_ctx: FLContext) -> Any:
        site = fl_ctx.get_identity_name()
        scope = fl_ctx.get_prop(FLContextKey.SCOPE_PROPERTIES) or {}
        folder = find_site_folder(site, scope.get(DATA_ROOT), os.environ)
        run, work = messages.run_folder(fl_ctx), bounds.site_training(fl_ctx, self._training_id)
        learning = (self._method, self._settings, self._training)
        bounds.job_method(*learning, fl_ctx)
        options: dict[str, Any] = {"log": self.logger.info, "results": run / WORK / "results"}
        if self._in_process:
            from heterosync.federation.site import SiteTrainer

            return SiteTrainer(site, folder, *learning, work, **options)
        from heterosync.federation.worker import TrainerProcess

        return TrainerProcess(site, folder, *learning, work, **options)

    def _close(self) -> None:
        with self._lock:
            trainer, self._trainer = self._trainer, None
        if trainer is not None and hasattr(trainer, "close"):
            trainer.close()
