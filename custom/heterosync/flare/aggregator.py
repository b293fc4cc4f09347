"""The server's fusion as a FLARE component."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from heterosync import pulse
from heterosync.errors import Aborted, ContributionRefused, UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.server import Server
from heterosync.federation.split import Tail
from heterosync.federation.wire import Blocked, WirePolicy, payload_bytes
from heterosync.flare import messages
from heterosync.flare.causes import guarded
from heterosync.flare.persistor import MEMORY
from heterosync.methods import make_method


class EqualWeightAggregator(Aggregator):
    """Means the contributions of a round with equal weights (paper equation 1), whatever the size of a site.

    It wraps `Server`: order of arrival does not matter, contributions wait on disk in the run folder, and one that does
    not fit is refused by name while the round goes on. (A method that asks for sample weights gets them, and one with a
    server's rule of its own has it applied to the mean.)

    method, method_settings, training: as in the executor.

    Read by the controller after `close`, each by site: `metrics` (scalars), `refused` (reason), `payload` (bytes); the
    first and the last do not change then, however late a site answers.
    """

    def __init__(self, method: str, method_settings: dict | None = None, training: dict | None = None):
        super().__init__()
        self._method, self._settings, self._training = method, method_settings or {}, training or {}
        self._server: Server | None = None
        self._spill: Path | None = None
        self._round = -1
        self._open = False
        self._lock = threading.Lock()  # answers, late ones too, come in on several threads
        self._policy = WirePolicy(method, {})
        self.reports: dict[str, dict[str, Any]] = {}  # of the check-in, by site
        self.metrics: dict[str, dict[str, float]] = {}
        self.refused: dict[str, str] = {}
        self.payload: dict[str, int] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == AppEventType.ROUND_STARTED:
            guarded(self, fl_ctx, self._start, fl_ctx)
        elif event_type == EventType.END_RUN and self._spill is not None:
            shutil.rmtree(self._spill, ignore_errors=True)

    def _start(self, fl_ctx: FLContext) -> None:
        with self._lock:
            state = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS] or {}
            self._round = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
            self.serve(state, fl_ctx).start(self._round, state)
            self.metrics, self.refused, self.payload = {}, {}, {}
            self._open = True

    def serve(self, state: Mapping[str, Any], fl_ctx: FLContext) -> Server:
        """The server's half of the method, made when first asked for, after the check-in; it goes on from `state`."""
        if self._server is None:
            self._spill = messages.run_folder(fl_ctx) / "contributions"
            method = make_method(self._method, self._settings, self._training)
            self._server = Server(method, state, fl_ctx.get_prop(MEMORY), self._spill, list(self.reports))
            if self._server.tail is not None:
                self._server.tail.checked_in(self.reports)
        return self._server

    @property
    def tail(self) -> Tail | None:
        """The server's half of a network that is cut, once a round has begun."""
        return self._server.tail if self._server is not None else None

    def close(self) -> None:
        """End the round: whatever a site answers from now on is refused."""
        with self._lock:
            self._open = False

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Take a site's answer to the train task. False, with the reason in `refused` and the log, if it does not fit.

        Never raises: with FLARE, an exception here would end the round for all sites.
        """
        site = messages.sender_of(shareable)
        with self._lock:
            reason = self._take(site, shareable)
        if reason is None:
            return True
        self.refuse(site, reason, fl_ctx)
        return False

    def refuse(self, site: str, reason: str, fl_ctx: FLContext) -> None:
        """Put on record why a site's answer does not count."""
        self.log_warning(fl_ctx, f"round {self._round}: contribution of site {site} refused: {reason}")
        # A second answer of a site that has contributed already does not undo the first.
        if site not in self.metrics:
            self.refused[site] = reason

    def _take(self, site: str, shareable: Shareable) -> str | None:
        """Add an answer to the fusion; the reason when it does not fit."""
        try:
            if self._server is None:
                return "no round has begun"
            sent_for = shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND)
            if sent_for != self._round:
                return f"it answers round {sent_for}, this is round {self._round}"
            if not self._open:
                return "the round is closed"
            contribution = self._read(site, shareable)
            self._server.accept(contribution)
            self.payload[site] = payload_bytes(contribution.tensors)
            self.metrics[site] = contribution.metrics
            return None
        except ContributionRefused as refusal:
            return refusal.reason
        except Blocked as error:
            return messages.distrusted(error)
        except Exception as error:
            return f"it could not be read ({type(error).__name__}: {error})"

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """The fused state as a message; an empty one when no tensors are shared, nobody contributed or the job ends."""
        assert self._server is not None
        self.close()
        state = self._fused(fl_ctx) if self.metrics and self._server.shares else {}
        fl_ctx.set_prop(MEMORY, self._server.memory, private=True, sticky=True)
        return messages.tensors_message(state)

    def _fused(self, fl_ctx: FLContext) -> dict[str, Any]:
        """The next global state; nothing when the job ends meanwhile: some methods work for long here."""
        assert self._server is not None
        abort_signal = fl_ctx.get_run_abort_signal()
        try:
            with pulse.until(lambda: abort_signal is not None and abort_signal.triggered):
                return self._server.result()
        except Aborted:
            pass
        except UserError as error:  # FLARE would put a traceback before it
            self.system_panic(str(error), fl_ctx)
        return {}

    def _read(self, site: str, shareable: Shareable) -> Contribution:
        assert self._server is not None
        tensors, fields = messages.open_message(shareable)
        metrics = fields.get("metrics", {})
        if not isinstance(metrics, dict):
            raise TypeError("its metrics are no dictionary")
        self._policy.check({}, metrics)  # the tensors are checked by the fusion
        return Contribution(
            site=site,
            method=str(fields.get("method")),
            round=fields.get("round", -1),
            tensors=messages.materialized(tensors, self._server.fusion.reference),
            metrics={name: float(value) for name, value in metrics.items()},
            samples=int(fields.get("samples", 0)),
        )
