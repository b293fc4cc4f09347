"""Networks that are cut, over FLARE: the steps of a round as requests of the sites to the server.

A round is one training task like any other. While it runs, each site sends the messages of its steps as FLARE's
auxiliary requests, which the server answers at once, when those of all sites are there; a task per step would cost a
poll. FLARE applies no filters to such requests, so `ask_server` does, the site's own first, as to the answer of a task.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.apis.utils.task_utils import apply_filters
from nvflare.app_common.app_constant import AppConstants
from nvflare.private.privacy_manager import Scope

from heterosync.errors import HeteroSyncError, UserError
from heterosync.federation.split import Ask, Exchange, Tail
from heterosync.federation.wire import Blocked, WirePolicy
from heterosync.flare import messages
from heterosync.methods.base import Parcel

#: Header of a step's message: its number within the round.
STEP = "heterosync_step"
#: Seconds; the server answers within the job's task_timeout or ends the job, and FLARE then gives up every request.
FOREVER = 10.0**7


class Ended(HeteroSyncError):
    """The server will not go on with the round; it knows why."""


def ask_server(fl_ctx: FLContext, abort_signal: Signal) -> Ask:
    """How a site asks the server while it trains in the task of `fl_ctx`. Nothing leaves but by the site's filters."""
    round_ = fl_ctx.get_prop(messages.ROUND)

    def ask(step: int, parcel: Parcel) -> Parcel:
        filters = fl_ctx.get_prop(ReservedKey.RUNNER).task_result_filters
        request, task = messages.tensors_message(parcel), fl_ctx.get_prop(FLContextKey.TASK_NAME)
        fl_ctx.set_prop(FLContextKey.TASK_NAME, messages.EXCHANGE, private=True, sticky=False)
        try:
            kind = Scope.TASK_RESULT_FILTERS_NAME
            request = apply_filters(kind, request, fl_ctx, filters, messages.EXCHANGE, FilterKey.OUT, abort_signal)
        finally:
            fl_ctx.set_prop(FLContextKey.TASK_NAME, task, private=True, sticky=False)
        failure = messages.failure_of(request)
        if failure is not None:
            raise UserError(f"step {step} of round {round_}: {failure}")
        request.set_header(AppConstants.CURRENT_ROUND, round_)
        request.set_header(STEP, step)
        replies = fl_ctx.get_engine().send_aux_request(None, messages.EXCHANGE, request, FOREVER, fl_ctx)
        reply = next(iter(replies.values()), make_reply(ReturnCode.COMMUNICATION_ERROR))
        failure = messages.failure_of(reply)
        if failure is not None:
            raise Ended(f"step {step} of round {round_}: the server gave no answer ({failure})")
        return messages.open_message(reply)[0]

    return ask


class Desk:
    """The server's side of the steps. `fail` is told why a round cannot go on. patience: seconds that the sites wait in
    a step for each other, 0 for ever."""

    def __init__(self, method: str, fail: Callable[[str, FLContext], None], patience: float):
        self._method, self._fail, self._patience = method, fail, patience or FOREVER
        self._round, self._exchange = -1, Exchange([], lambda sent: {})
        self._policy = WirePolicy(method, {})
        self._opening = threading.Lock()

    def open(self, round_: int, sites: list[str], tail: Tail) -> int:
        """Begin a round, which `tail` has begun, unless that was done; the number of images per epoch."""
        with self._opening:
            if self._round != round_:
                made = tail.method
                self._policy = WirePolicy(self._method, {}, made.parcels(tail.model), made.training.batch_size)
                self._exchange = Exchange(sites, tail.answer, self._patience)
                self._round = round_
        return tail.items

    def close(self, why: str) -> None:
        """Let no site wait any longer."""
        self._exchange.close(why)

    def leave(self, site: str) -> int:
        """As `Exchange.leave`; the bytes that the site has sent in the steps of this round."""
        self._exchange.leave(site)
        return self._exchange.bytes[site]

    def answer(self, topic: str, request: Shareable, fl_ctx: FLContext) -> Shareable:
        """Answer one message of a site, when those of all sites are in. Never raises."""
        site, exchange = messages.sender_of(request), self._exchange
        try:
            if request.get_header(AppConstants.CURRENT_ROUND) != self._round:
                raise HeteroSyncError(f"site {site} sent a step of another round than {self._round}")
            tensors, _ = messages.open_message(request)
            self._policy.check_step(tensors)
            return messages.tensors_message(exchange.ask(site, request.get_header(STEP), tensors))
        except Blocked as error:
            why = f"site {site}: {messages.distrusted(error)}"
        except HeteroSyncError as error:
            why = str(error)
        except Exception as error:
            why = f"site {site}: {type(error).__name__}: {error}"
        exchange.close(why)
        self._fail(f"round {self._round}: {why}", fl_ctx)
        return make_reply(ReturnCode.EXECUTION_EXCEPTION)
