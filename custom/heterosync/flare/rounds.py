"""FLARE's rounds of training, under our supervision."""

from __future__ import annotations

from typing import Any

from nvflare.apis.controller_spec import ClientTask, Task
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from heterosync.flare.supervised import Supervision, send_without_copy


class SupervisedRounds(Supervision, ScatterAndGather):
    """FLARE's ScatterAndGather, kept to the sites that passed the check-in; `HeteroSyncController` is the only one."""

    def broadcast_and_wait(self, task: Task, fl_ctx: FLContext, *args: Any, **options: Any) -> None:
        """As FLARE's, but only to the sites that take part."""
        super().broadcast_and_wait(task, fl_ctx, list(self._sites), *args, **options)

    def _process_train_result(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        self._guarded(fl_ctx, super()._process_train_result, client_task, fl_ctx)

    def _prepare_train_task_data(self, client_task: ClientTask, fl_ctx: FLContext) -> None:
        super()._prepare_train_task_data(client_task, fl_ctx)
        send_without_copy(client_task, fl_ctx)
