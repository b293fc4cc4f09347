"""The one gate that every answer of a site passes: an allow-list, and an audit line for each message."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable, make_reply

from heterosync.errors import HeteroSyncError
from heterosync.federation.wire import Blocked, WirePolicy, audit_lines, reportable, signature
from heterosync.flare import messages
from heterosync.methods import make_method, method_names

#: Lists of what left a site, in its folder of a job: of the filter of the job, and of the site's own.
AUDIT_FILE, SITE_AUDIT_FILE = "audit.jsonl", "audit_site.jsonl"
#: Fields that accompany the tensors and metrics of a training answer.
ENVELOPE = {"method": str, "round": int, "samples": int, "metrics": dict}
_KEYS = frozenset({"DXO", ReservedHeaderKey.HEADERS})
_HEADERS = frozenset({ReservedHeaderKey.RC, ReservedHeaderKey.CONTENT_TYPE})


class OutboundFilter(Filter):
    """Lets pass what the wire policy of the job's method names, and nothing else.

    A task result filter of every job, on all tasks of the clients. It writes one line per message into `audit.jsonl` in
    the site's folder of the job: time, task, round, whether it left, and name, shape, type and bytes of all it holds.
    An answer with anything else in it never leaves: the server gets an error reply that says no more than that. What
    leaves is a message built anew from what was checked, so that nothing hides in a corner of the old one.

    method, method_settings, training: as in the executor; they fix the names, shapes and types of the shared tensors.
    """

    audit_file = AUDIT_FILE

    def __init__(self, method: str, method_settings: dict | None = None, training: dict | None = None):
        super().__init__()
        self._method, self._settings, self._training = method, method_settings or {}, training or {}
        self._policy: WirePolicy | None = None

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """A fresh message of what was checked when all of it may leave, else a bare error reply. Never raises."""
        task = str(fl_ctx.get_prop(FLContextKey.TASK_NAME, ""))
        record: dict[str, Any] = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "task": task}
        try:
            record["round"] = fl_ctx.get_prop(messages.ROUND)
            if messages.failure_of(shareable) is not None:
                record.update(left=True, failure=str(shareable.get_return_code()), items=[])
                reply = _bare_failure(shareable)
            else:
                self._prepare(fl_ctx)
                tensors, scalars, reply = self._checked(task, shareable, fl_ctx)
                reply.set_return_code(ReturnCode.OK)
                record.update(left=True, items=audit_lines(tensors, scalars))
        except Exception as error:
            # Whatever goes wrong here, the message stays. No ERROR: FLARE streams lines of that level to the server.
            reason = str(error) if isinstance(error, (Blocked, HeteroSyncError)) else type(error).__name__
            record.update(left=False, reason=reason, items=[])
            self.logger.warning("%s%s", messages.PROBLEM, reason)
            reply = messages.refusal("blocked")
        try:
            self._write(record, fl_ctx)
        except OSError:
            self.logger.warning("%scannot write %s: without it nothing leaves", messages.PROBLEM, self.audit_file)
            return messages.refusal("blocked")
        return reply

    def _prepare(self, fl_ctx: FLContext) -> None:
        """Called before each message is checked; may raise `Blocked`."""

    def _may_leave(self, tensors: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
        """The metrics of a message that passed the wire policy which leave with it. May raise `Blocked`."""
        return reportable(metrics)

    def _checked(
        self, task: str, shareable: Shareable, fl_ctx: FLContext
    ) -> tuple[dict[str, Any], dict[str, Any], Shareable]:
        """Tensors and scalars of a permitted answer, and a message of these alone. Raises `Blocked`."""
        if task not in (*messages.TASKS, messages.EXCHANGE):
            raise blocked(f"answers to task '{task[:40]}' are not foreseen")
        headers = set(shareable.get(ReservedHeaderKey.HEADERS, {}))
        for name in sorted({str(key) for key in shareable} - _KEYS) + sorted(map(str, headers - _HEADERS)):
            raise blocked(f"the message holds '{name[:40]}'")
        tensors, scalars = messages.open_message(shareable)
        policy = self._get_policy()
        if task == messages.TRAIN:
            envelope = opened(scalars)
            policy.check(tensors, envelope["metrics"])
            envelope["metrics"] = self._may_leave(tensors, envelope["metrics"])
            return tensors, envelope["metrics"], messages.tensors_message(tensors, envelope)
        if task == messages.EXCHANGE:
            if scalars:
                raise blocked("a step's message holds tensors only")
            policy.check_step(tensors)
            return tensors, self._may_leave(tensors, {}), messages.tensors_message(tensors)
        if tensors:
            raise blocked(f"the task {task} is answered with scalars only")
        if task == messages.CHECK_IN:
            policy.check_report(scalars)
        else:
            policy.check({}, scalars)
            scalars = self._may_leave({}, scalars)
        return {}, scalars, messages.scalars_message(scalars)

    def _get_policy(self) -> WirePolicy:
        if self._policy is None:
            method = make_method(self._method, self._settings, self._training)
            model = method.build_model(weights="none")
            state = model.state_dict()
            sent = {name: signature(state[name]) for name in method.returned_names(model)}
            self._policy = WirePolicy(self._method, sent, method.parcels(model), method.training.batch_size)
        return self._policy

    def _write(self, record: Mapping[str, Any], fl_ctx: FLContext) -> None:
        with (messages.run_folder(fl_ctx) / self.audit_file).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def opened(envelope: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that go with the tensors of a training answer. Raises `Blocked` when they are not `ENVELOPE`."""
    for name, value in envelope.items():
        kind = ENVELOPE.get(name)
        if kind is None or not isinstance(value, kind) or isinstance(value, bool):
            raise blocked(f"field '{str(name)[:40]}' of a training answer is not foreseen")
    if envelope.get("method") not in method_names():
        raise blocked("a training answer names a method that does not exist")
    return {name: kind(envelope.get(name, kind())) for name, kind in ENVELOPE.items()}


def blocked(what: str) -> Blocked:
    """The error of a filter that holds something back."""
    return Blocked(f"blocked from leaving the site: {what}")


def _bare_failure(shareable: Shareable) -> Shareable:
    """An error reply with nothing in it but its code and one of the agreed reasons."""
    reason = shareable.get_header(messages.REASON)
    headers = {messages.REASON: reason} if reason in messages.REASONS else {}
    return make_reply(shareable.get_return_code(), headers=headers)
