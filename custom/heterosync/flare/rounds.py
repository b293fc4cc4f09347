"""FLARE's rounds of training, under our supervision."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnableKey
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from heterosync.flare.sending import Payload, send
from heterosync.flare.supervised import Supervision


class SupervisedRounds(Supervision, ScatterAndGather):
    """FLARE's ScatterAndGather, kept to the sites that passed the check-in, each of which gets what its method says;
    `HeteroSyncController` is the only one."""

    def _begin(self, abort_signal: Signal, fl_ctx: FLContext) -> None:
        self._server = self.aggregator.serve(self._global_weights[ModelLearnableKey.WEIGHTS] or {}, fl_ctx)

    def broadcast_and_wait(self, task: Task, fl_ctx: FLContext, *args: Any, **options: Any) -> None:
        """As FLARE's, but only to the sites that take part."""
        super().broadcast_and_wait(task, fl_ctx, list(self._sites), *args, **options)

    def _process_train_result(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        self._guarded(fl_ctx, super()._process_train_result, client_task, fl_ctx)

    def _prepare_train_task_data(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        super()._prepare_train_task_data(client_task, fl_ctx)
        self._guarded(fl_ctx, send, client_task, self._last_model())

    def _last_model(self) -> Payload:
        return self._model(self._global_weights[ModelLearnableKey.WEIGHTS])

    def _model(self, state: Mapping[str, Any], memory: Mapping[str, Any] | None = None) -> Payload:
        """A global state as it goes to the sites; `memory` as in `Server.for_site`."""
        return partial(self._server.for_site, state=state, memory=memory) if self._rules.per_site else state
