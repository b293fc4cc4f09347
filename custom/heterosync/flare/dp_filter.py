"""Clipped and noised updates as a filter at the site, before the outbound filter."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from nvflare.apis.filter import Filter
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from heterosync.errors import HeteroSyncError
from heterosync.federation.privacy import noisy_state, running_variances
from heterosync.files import make_folder
from heterosync.flare import bounds, messages
from heterosync.methods import make_method

RELEASES_FILE = "privacy.jsonl"
#: Private property of the context of an answer that the site's own filter has noised already.
NOISED = "heterosync_noised"


class NoisyUpdate:
    """Replaces what a site has trained by its clipped and noised update of what it received.

    Every release is a line in `privacy.jsonl` in the site's folder of the training: time, round, norm of the update
    (which never leaves), clip, noise. After as many releases as the training has rounds nothing more leaves, in this
    job or in one that goes on with the training: noise that is drawn again for the same round could be averaged out by
    whoever asks.

    clip: largest L2 norm of an update. noise: standard deviation of the noise, in units of `clip`.
    method, method_settings, training, training_id: as in the executor. Raises `HeteroSyncError` for other numbers.
    """

    def __init__(
        self,
        clip: float,
        noise: float,
        method: str,
        method_settings: dict | None = None,
        training: dict | None = None,
        training_id: str = "",
    ):
        self._clip, self._noise = float(clip), float(noise)
        if not (0 < self._clip < math.inf and 0 <= self._noise < math.inf):
            raise HeteroSyncError(f"clip {clip!r} and noise {noise!r} of the job are no numbers that can be used")
        self._method, self._settings, self._training = method, method_settings or {}, training or {}
        self._training_id = training_id
        self._variances: frozenset[str] | None = None

    def __call__(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The answer to a training task with the noised state. Raises whatever keeps it from being made."""
        method = make_method(self._method, self._settings, self._training)
        if self._variances is None:
            self._variances = running_variances(method.build_model(weights="none"))
        received, _ = messages.open_message(fl_ctx.get_prop(messages.TASK))
        trained, fields = messages.open_message(shareable)
        state, norm = noisy_state(received, trained, self._clip, self._noise, self._variances)
        self._count({"round": fields.get("round"), "norm": norm}, method.training.rounds, fl_ctx)
        return messages.tensors_message(state, fields)

    def _count(self, release: dict[str, Any], rounds: int, fl_ctx: FLContext) -> None:
        """Write the release down before it happens. Raises `HeteroSyncError` when there were enough."""
        path = make_folder(bounds.site_training(fl_ctx, self._training_id)) / RELEASES_FILE
        before = len(path.read_text(encoding="utf-8").splitlines()) if path.exists() else 0
        if before >= rounds:
            raise HeteroSyncError(f"{before} noised updates have left already, the training has {rounds} rounds")
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **release, "clip": self._clip, "noise": self._noise}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class NoisyUpdateFilter(Filter):
    """`NoisyUpdate` as a task result filter of jobs that are exported with `dp_clip`, before the outbound filter.

    FLARE runs a site's own filters first. Where one of these has noised an answer (see `SiteOutboundFilter`, which then
    keeps to the stricter values of site and job), it passes: a second noise would only cost accuracy.
    Arguments as in `NoisyUpdate`.
    """

    def __init__(
        self,
        clip: float,
        noise: float,
        method: str,
        method_settings: dict | None = None,
        training: dict | None = None,
        training_id: str = "",
    ):
        super().__init__()
        self._update = NoisyUpdate(clip, noise, method, method_settings, training, training_id)

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The answer with the noised state; answers to other tasks and failures as they are. Never raises."""
        task = fl_ctx.get_prop(FLContextKey.TASK_NAME)
        if task != messages.TRAIN or messages.failure_of(shareable) is not None or fl_ctx.get_prop(NOISED):
            return shareable
        try:
            return self._update(shareable, fl_ctx)
        except Exception as error:  # whatever goes wrong here, the message stays
            reason = str(error) if isinstance(error, HeteroSyncError) else f"{type(error).__name__}: {error}"
            self.logger.warning("%sno update leaves: %s", messages.PROBLEM, reason)
            return messages.refusal("blocked")
