"""A site's side of a swarm job: its trainer, the fusion when its turn comes, the models it keeps, and its two gates.

FLARE's `SwarmClientController` leads: every round one site, drawn by chance, gathers the contributions, fuses them and
sends the fused model to all. It calls the executor itself, past the task result filters; what goes from site to site is
seen by task data filters of direction "out" (measured with FLARE 2.9.0, which then sends the message as it was before
them, so that a filter must change it in place).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.ccwf.common import Constant, ResultType

from heterosync.errors import HeteroSyncError, UserError
from heterosync.federation.initial import provisioned_at
from heterosync.federation.modelfile import BEST_MODEL, LAST_MODEL, load_model
from heterosync.federation.wire import audit_lines, is_site_name
from heterosync.files import link_file, read_json, write_json
from heterosync.flare import messages
from heterosync.flare.aggregator import EqualWeightAggregator
from heterosync.flare.executor import WORK, HeteroSyncExecutor
from heterosync.flare.filters import OutboundFilter, blocked, opened
from heterosync.flare.persistor import LABELS, ORIGIN, GlobalModelPersistor
from heterosync.methods import make_method

#: Tasks between server and site, and from site to site. FLARE joins the workflow's prefix and its own words.
CONTROL_TASKS = ("swarm_config", "swarm_start")
PEER_TASKS = ("swarm_learn", "swarm_report_learn_result", "swarm_report_final_result")
#: Scalars of the site's rounds, in its work folder, until the server asks for them.
ROUNDS = "rounds.json"
_KEPT = "global-{}.pt"


class SwarmExecutor(HeteroSyncExecutor):
    """`HeteroSyncExecutor` for models that never come from the server: it takes them from this site's own files."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """Answer one task. Never raises."""
        folder = messages.run_folder(fl_ctx)
        try:
            if task_name == messages.REPORT:
                _settle(folder, shareable)
                return messages.scalars_message(read_json(folder / WORK / ROUNDS)[str(messages.round_of(shareable))])
            if task_name == messages.VALIDATE:
                shareable = _with_model(folder, shareable)
            reply = super().execute(task_name, shareable, fl_ctx, abort_signal)
            if messages.failure_of(reply) is None:
                scalars = messages.open_message(reply)[1]
                if task_name == messages.CHECK_IN:
                    fl_ctx.set_prop(LABELS, tuple(scalars["labels"]), private=True, sticky=True)
                    method = make_method(self._method, self._settings, self._training)
                    fl_ctx.set_prop(ORIGIN, provisioned_at(method, {"": scalars}), private=True, sticky=True)
                    if scalars["initial_weights"] is None:  # any site may have to make the first state of all
                        first = method.first_weights(method.training)
                        return messages.scalars_message({**scalars, "initial_weights": first})
                elif task_name == messages.TRAIN:
                    file = folder / WORK / ROUNDS
                    known = read_json(file) if file.exists() else {}
                    write_json(file, {**known, str(scalars["round"]): scalars["metrics"]})
            return reply
        except UserError as error:
            self._say_here(str(error))
            return messages.refusal("mend")
        except Exception as error:
            self._say_here(f"{type(error).__name__}: {error}")
            return messages.refusal("defect")


def _with_model(folder: Path, task: Shareable) -> Shareable:
    """The question with this site's file of the model that it asks about, "best" or "last"."""
    _settle(folder, task)
    name = BEST_MODEL if task.get_header(messages.MODEL) == "best" else LAST_MODEL
    whole = messages.tensors_message(load_model(folder / name).state)
    for header in (messages.SPLIT, messages.MODEL, AppConstants.CURRENT_ROUND):
        whole.set_header(header, task.get_header(header))
    return whole


def _settle(folder: Path, question: Shareable) -> None:
    """Keep of the global models the best one, which the server names, and those that nobody has judged yet."""
    best, round_ = question.get_header(messages.BEST), messages.round_of(question)
    for file in folder.glob(_KEPT.format("*")):
        number = int(file.stem.removeprefix("global-"))
        if number == best:
            link_file(file, folder / BEST_MODEL)
        elif number < round_:
            file.unlink()


class SwarmAggregator(EqualWeightAggregator):
    """The fusion at the site whose turn it is. All sites of the job contribute, or the job ends with the reason."""

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        if not shareable.get_peer_props():  # this site's own contribution, which took no way at all
            own = fl_ctx.get_peer_context().get_identity_name()
            shareable.set_peer_props({ReservedKey.IDENTITY_NAME: own})
        return super().accept(shareable, fl_ctx)

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """Raises `HeteroSyncError` when a site is missing; its text names sites and says nothing of their data."""
        self.close()
        known = {client.name for client in fl_ctx.get_engine().all_clients}
        absent = {site: self.refused.get(site, messages.NO_ANSWER) for site in sorted(known - set(self.metrics))}
        if absent:
            why = "; ".join(f"site {site}: {reason}" for site, reason in absent.items())
            line = f"a swarm needs every site in every round: {why}"
            self.logger.warning("%s%s", messages.PROBLEM, line)
            raise HeteroSyncError(line)
        return super().aggregate(fl_ctx)


class SwarmPersistor(GlobalModelPersistor):
    """Keeps the global model at the site: `last_model.pt` after every round, and `best_model.pt`."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        super().handle_event(event_type, fl_ctx)
        if event_type == AppEventType.ROUND_STARTED and fl_ctx.get_prop(AppConstants.CURRENT_ROUND) > 0:
            self._keep(fl_ctx.get_prop(AppConstants.GLOBAL_MODEL), fl_ctx.get_prop(AppConstants.CURRENT_ROUND), fl_ctx)
        elif event_type == EventType.END_RUN:
            for file in messages.run_folder(fl_ctx).glob(_KEPT.format("*")):
                file.unlink()

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        self._keep(model, fl_ctx.get_prop(AppConstants.CURRENT_ROUND) + 1, fl_ctx)

    def _keep(self, model: ModelLearnable, rounds: int, fl_ctx: FLContext) -> None:
        folder = messages.run_folder(fl_ctx)
        kept = folder / _KEPT.format(rounds)
        if not kept.exists():
            self.write(model[ModelLearnableKey.WEIGHTS], rounds, fl_ctx)
            link_file(folder / LAST_MODEL, kept)  # a second name: it may turn out to be the best


class ServerGate(OutboundFilter):
    """`OutboundFilter` of a swarm: scalars may go to the server, tensors never, whatever task it thinks of."""

    def _checked(
        self, task: str, shareable: Shareable, fl_ctx: FLContext
    ) -> tuple[dict[str, Any], dict[str, Any], Shareable]:
        if task == messages.TRAIN:
            raise blocked("in a swarm the server gets no weights")
        if task in (*CONTROL_TASKS, *PEER_TASKS):
            return {}, {}, make_reply(ReturnCode.OK)
        return super()._checked(messages.VALIDATE if task == messages.REPORT else task, shareable, fl_ctx)


class PeerGate(OutboundFilter):
    """The gate from site to site: a task data filter of direction "inout", on `PEER_TASKS`.

    Out: a contribution, a fused model or a final model passes as the wire policy allows it and is written into
    `audit.jsonl`; anything else stops the job. The message is made anew, in place. It then lacks FLARE's order to
    forward the tensors as references (PASS_THROUGH): fetched later, those would cross the server readable to it, while
    tensors that are fetched with the message share its encryption from site to site (in secure mode).
    In: a task of learning that would have this site send its weights to anything but a site of the job is refused.

    method, method_settings, training: as in `OutboundFilter`.
    """

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The same object, changed. Raises `HeteroSyncError`, without a detail, when the message must not pass."""
        if fl_ctx.get_prop(FLContextKey.FILTER_DIRECTION) == FilterKey.IN:
            aggregator = shareable.get_header(Constant.AGGREGATOR)
            if aggregator is not None and not self._is_site(aggregator, fl_ctx):
                raise HeteroSyncError("the contribution would go to something that is no site of this job")
            return shareable
        record: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "to": "sites"}
        try:
            record["round"] = shareable.get_header(AppConstants.CURRENT_ROUND, shareable.get_header(Constant.ROUND))
            record["task"], tensors, scalars, clean = self._cleaned(shareable, fl_ctx)
            record.update(left=True, items=audit_lines(tensors, scalars))
            self._write(record, fl_ctx)
        except Exception as error:
            reason = str(error) if isinstance(error, HeteroSyncError) else type(error).__name__
            self.logger.warning("%s%s", messages.PROBLEM, reason)
            if "items" not in record:
                self._write({**record, "left": False, "reason": reason, "items": []}, fl_ctx)
            raise HeteroSyncError(messages.REASONS["blocked"]) from None
        shareable.clear()
        shareable.update(clean)
        return shareable

    def _cleaned(self, message: Shareable, fl_ctx: FLContext) -> tuple[str, dict[str, Any], dict[str, Any], Shareable]:
        """(kind, tensors, scalars, a message of these alone). Raises `Blocked`."""
        policy = self._get_policy()
        if Constant.RESULT in message:
            tensors = dict(message[Constant.RESULT][ModelLearnableKey.WEIGHTS])
            policy.check(tensors)
            clean = Shareable()
            clean[Constant.RESULT] = make_model_learnable(tensors, {})
            clean.set_header(Constant.RESULT_TYPE, ResultType.LAST)
            clean.set_header(Constant.ROUND, _number(message.get_header(Constant.ROUND)))
            return PEER_TASKS[2], tensors, {}, clean
        tensors, envelope = messages.open_message(message)
        aggregator = message.get_header(Constant.AGGREGATOR)
        if aggregator is not None:
            if not self._is_site(aggregator, fl_ctx):
                raise blocked("the task of learning names something that is no site of this job")
            policy.check(tensors)
            kind, scalars, clean = PEER_TASKS[0], {}, messages.tensors_message(tensors)
            clean.set_header(Constant.AGGREGATOR, aggregator)
            clean.set_header(AppConstants.NUM_ROUNDS, _number(message.get_header(AppConstants.NUM_ROUNDS)))
        else:
            envelope = opened(envelope)
            policy.check(tensors, envelope["metrics"])
            envelope["metrics"] = self._may_leave(tensors, envelope["metrics"])
            kind, scalars, clean = PEER_TASKS[1], envelope["metrics"], messages.tensors_message(tensors, envelope)
        round_ = _number(message.get_header(AppConstants.CURRENT_ROUND))
        clean.set_header(AppConstants.CURRENT_ROUND, round_)
        clean.add_cookie(AppConstants.CONTRIBUTION_ROUND, round_)
        lifetime = message.get_header(ReservedHeaderKey.MSG_ROOT_TTL)
        if lifetime is not None:
            clean.set_header(ReservedHeaderKey.MSG_ROOT_TTL, float(lifetime))
        return kind, tensors, scalars, clean

    @staticmethod
    def _is_site(name: Any, fl_ctx: FLContext) -> bool:
        return is_site_name(name) and name in {client.name for client in fl_ctx.get_engine().all_clients}


def _number(value: Any) -> int:
    """A round number as it may travel."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        raise blocked("a round number is no whole number")
    return value
