"""What is said between server and sites: task names, headers, the envelope of tensors and scalars, reasons of failure.

A message is a FLARE `Shareable` that holds one `DXO`: kind WEIGHTS when tensors travel (scalars in its meta), kind
METRICS when only scalars and short texts do. Tensors travel as torch tensors, by FLARE's download references.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs
from torch import Tensor

from heterosync.errors import HeteroSyncError
from heterosync.federation import wire
from heterosync.federation.wire import Blocked, WirePolicy

CHECK_IN, TRAIN, VALIDATE = "check_in", "train", "validate"
TASKS = (CHECK_IN, TRAIN, VALIDATE)
#: Within the training task of a network that is cut: a site's message of one step, a request to the server (split.py).
EXCHANGE = "exchange"
#: Header of that task: images per epoch, the same at every site.
ITEMS = "heterosync_items"
#: In a swarm: "what were your scalars of that round?"
REPORT = "report"

#: Headers of a validate task: which split is scored, under which name the model is known, how many rounds made it.
SPLIT, MODEL, MADE_IN = "heterosync_split", "heterosync_model", "heterosync_made_in"
#: Header of every question in a swarm: the best model so far, as a number of rounds (None: there is none).
BEST = "heterosync_best"
#: Private property of a site's context while it answers: the round of the task, for the audit.
ROUND = "heterosync_round"
#: The same for the task itself: a filter of the answer may need what the site received.
TASK = "heterosync_task"
#: Header of an error reply: one of `REASONS`. Nothing else about a failure ever leaves a site.
REASON = "heterosync_reason"

REASONS: dict[str, str] = {
    "mend": "its data or settings need mending; see the line PROBLEM in the site's own log.txt (a simulation: above)",
    "died": "its trainer process ended twice on this task (out of memory?); see trainer.log at the site",
    "hung": "its trainer process made no progress and was killed, twice on this task; see trainer.log at the site",
    "limit": "it was asked about more models than the rounds of the training allow; see log.txt at the site",
    "ended": "the server did not go on with the round that the site was in the middle of",
    "blocked": "its outbound filter blocked the message; see audit.jsonl at the site",
    "defect": "an unexpected error; its traceback is in the site's own log.txt",
}

NO_ANSWER = "no answer in time"

#: Marks the one line of a log that a user has to read; the simulator wrapper looks for it.
PROBLEM = "PROBLEM: "
#: Logged by a site once its part of the job is loaded.
READY = "ready for tasks"


def register_tensors() -> None:
    """Let FLARE carry torch tensors. Needed in every process that sends or receives them, before the first message."""
    fobs.register(TensorDecomposer)


def tensors_message(tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> Shareable:
    return DXO(DataKind.WEIGHTS, data=dict(tensors), meta=dict(meta or {})).to_shareable()


def scalars_message(values: Mapping[str, Any]) -> Shareable:
    return DXO(DataKind.METRICS, data=dict(values)).to_shareable()


def open_message(message: Shareable) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, scalars) of a message. Raises `HeteroSyncError` when it is none of ours.

    Tensors that FLARE offloaded to the server's disk are handed on as they are, with a `materialize` method.
    """
    try:
        dxo = from_shareable(message)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise HeteroSyncError("the message holds no data exchange object") from error
    if dxo.data_kind == DataKind.WEIGHTS:
        return dict(dxo.data), dict(dxo.meta or {})
    if dxo.data_kind == DataKind.METRICS:
        return {}, dict(dxo.data)
    raise HeteroSyncError(f"the message is of kind {dxo.data_kind}; WEIGHTS or METRICS was expected")


def materialized(tensors: Mapping[str, Any], wanted: Collection[str]) -> dict[str, Any]:
    """The same tensors, the wanted ones read from FLARE's disk offload where they lie there.

    What a site sends beyond them stays on the disk: it will be refused by its name, and may be of any size.
    """
    return {
        name: value.materialize() if name in wanted and hasattr(value, "materialize") else value
        for name, value in tensors.items()
    }


def refusal(reason: str) -> Shareable:
    """The reply of a site that could not do its task; `reason` is a key of `REASONS`."""
    return make_reply(ReturnCode.EXECUTION_EXCEPTION, headers={REASON: reason})


def failure_of(reply: Shareable) -> str | None:
    """None for a good reply, else one readable clause without any private detail."""
    code = reply.get_return_code()
    if code in (None, "", ReturnCode.OK):
        return None
    return REASONS.get(str(reply.get_header(REASON)), f"it answered {code}")


def distrusted(error: Blocked) -> str:
    """What the wire policy has against an answer that arrived, as one line in the words of the server."""
    what = str(error).rpartition("leaving the site: ")[2]
    return f"it holds what no site may send: {' '.join(what.split())}"


class Answers:
    """Scalars that the sites answer to one task; a site is not trusted to have checked what it sends.

    good: site -> scalars. failed: site -> reason, at first `NO_ANSWER` for each of `sites`.
    policy: what the scalars must keep to. arrived: told site and scalars of each good answer at once.
    """

    def __init__(
        self,
        task: str,
        sites: Iterable[str],
        policy: WirePolicy,
        arrived: Callable[[str, dict[str, Any]], None] | None = None,
    ):
        self._task, self._policy, self._arrived = task, policy, arrived
        self._lock = threading.Lock()  # FLARE hands over answers on several threads
        self._closed = False
        self.good: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = dict.fromkeys(sites, NO_ANSWER)

    def take(self, site: str, reply: Shareable) -> str | None:
        """Judge and keep an answer; the reason when it is none. Raises only what `arrived` raises."""
        with self._lock:
            if self._closed:
                return NO_ANSWER
            failure, scalars = self._judged(site, reply)
            if failure is not None:
                self.failed[site] = failure
                return failure
            self.good[site] = scalars
            self.failed.pop(site, None)
            if self._arrived is not None:
                self._arrived(site, scalars)
            return None

    def close(self) -> None:
        """Take no more answers: from now on nothing here changes."""
        with self._lock:
            self._closed = True

    def _judged(self, site: str, reply: Shareable) -> tuple[str | None, dict[str, Any]]:
        failure = failure_of(reply)
        if failure is not None:
            return failure, {}
        try:
            tensors, scalars = open_message(reply)
            if tensors:
                raise HeteroSyncError("it holds tensors where only scalars were asked for")
            if self._task == CHECK_IN:
                self._policy.check_report(scalars)
                missing = [name for name in wire.CHECK_IN if name not in scalars]
                if missing:
                    raise HeteroSyncError(f"it lacks {', '.join(missing)}")
                if scalars["site"] != site:
                    raise HeteroSyncError("it is in the name of another site")
            else:
                self._policy.check({}, scalars)
            return None, scalars
        except Blocked as error:
            return distrusted(error), {}
        except HeteroSyncError as error:
            return str(error), {}
        except Exception as error:
            return f"it could not be read ({type(error).__name__})", {}


def round_of(message: Shareable) -> int:
    """Round number that the server put on a task. Raises `HeteroSyncError` without one."""
    round_ = message.get_header(AppConstants.CURRENT_ROUND)
    if not isinstance(round_, int) or isinstance(round_, bool):
        raise HeteroSyncError("the task carries no round number")
    return round_


def sender_of(message: Shareable) -> str:
    """Name of the site that sent a reply, as FLARE authenticated it."""
    return str(message.get_peer_prop(ReservedKey.IDENTITY_NAME, "?"))


def run_folder(fl_ctx: FLContext) -> Path:
    """This participant's folder of the running job; the same for all processes of the job."""
    return Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
