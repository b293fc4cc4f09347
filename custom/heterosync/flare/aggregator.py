"""The server's fusion as a FLARE component."""

from __future__ import annotations

import shutil
from pathlib import Path

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from heterosync.errors import ContributionRefused
from heterosync.federation.contribution import Contribution
from heterosync.federation.fusion import Fusion
from heterosync.federation.wire import payload_bytes
from heterosync.flare import messages
from heterosync.methods import get_method


class EqualWeightAggregator(Aggregator):
    """Means the contributions of a round with equal weights (paper equation 1), whatever the size of a site.

    It wraps `Fusion`: order of arrival does not matter, contributions wait on disk in the run folder, and one that does
    not fit is refused by name while the round goes on. (A method that asks for sample weights gets them.)

    method: name of the method that the job trains.

    Read by the controller after a round, each by site: `metrics` (scalars), `refused` (reason), `payload` (bytes).
    """

    def __init__(self, method: str):
        super().__init__()
        self._method = method
        self._fusion: Fusion | None = None
        self._spill: Path | None = None
        self._round = -1
        self.metrics: dict[str, dict[str, float]] = {}
        self.refused: dict[str, str] = {}
        self.payload: dict[str, int] = {}

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            messages.register_tensors()
        elif event_type == AppEventType.ROUND_STARTED:
            self._start(fl_ctx)
        elif event_type == EventType.END_RUN and self._spill is not None:
            shutil.rmtree(self._spill, ignore_errors=True)

    def _start(self, fl_ctx: FLContext) -> None:
        state = fl_ctx.get_prop(AppConstants.GLOBAL_MODEL)[ModelLearnableKey.WEIGHTS] or {}
        self._round = fl_ctx.get_prop(AppConstants.CURRENT_ROUND)
        if self._fusion is None:
            self._spill = messages.run_folder(fl_ctx) / "contributions"
            self._fusion = Fusion(state, get_method(self._method).weighting, self._method, spill=self._spill)
        self._fusion.start(self._round)
        self.metrics, self.refused, self.payload = {}, {}, {}

    def accept(self, shareable: Shareable, fl_ctx: FLContext) -> bool:
        """Take a site's answer to the train task. False, with the reason in `refused` and the log, if it does not fit.

        Never raises: with FLARE, an exception here would end the round for all sites.
        """
        site = messages.sender_of(shareable)
        try:
            if self._fusion is None:
                raise ContributionRefused(site, "no round has begun")
            sent_for = shareable.get_cookie(AppConstants.CONTRIBUTION_ROUND)
            if sent_for != self._round:
                raise ContributionRefused(site, f"it answers round {sent_for}, this is round {self._round}")
            contribution = _contribution(site, shareable)
            self._fusion.accept(contribution)
            self.payload[site] = payload_bytes(contribution.tensors)
            self.metrics[site] = contribution.metrics
            return True
        except ContributionRefused as refusal:
            reason = refusal.reason
        except Exception as error:
            reason = f"it could not be read ({type(error).__name__}: {error})"
        self.log_warning(fl_ctx, f"round {self._round}: contribution of site {site} refused: {reason}")
        # A second answer of a site that has contributed already does not undo the first.
        if site not in self.metrics:
            self.refused[site] = reason
        return False

    def aggregate(self, fl_ctx: FLContext) -> Shareable:
        """The fused state as a message; an empty one when no tensors are shared or nobody contributed."""
        assert self._fusion is not None
        fused = self._fusion.result() if self.metrics and self._fusion.reference else {}
        return messages.tensors_message(fused)


def _contribution(site: str, shareable: Shareable) -> Contribution:
    tensors, fields = messages.open_message(shareable)
    return Contribution(
        site=site,
        method=str(fields.get("method")),
        round=fields.get("round", -1),
        tensors=messages.materialized(tensors),
        metrics={str(name): float(value) for name, value in dict(fields.get("metrics", {})).items()},
        samples=int(fields.get("samples", 0)),
    )
