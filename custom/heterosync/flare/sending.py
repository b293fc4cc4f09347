"""What FLARE sends of a broadcast task: nothing is copied, and each site may get tensors of its own.

FLARE 2.9.0 copies a task's data for the first client that asks, and sends that copy to all. It looks for the copy right
after it has called `before_task_sent_cb` for a client, under the lock of the task: what is put there then is what this
client gets (measured: tests/flare/test_per_site.py). The copy guards against changes in place; nothing here makes any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from nvflare.apis.controller_spec import ClientTask
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.shareable import make_copy

#: A model as it goes to the sites: the same to all, or by site.
Payload: TypeAlias = Mapping[str, Any] | Callable[[str], Mapping[str, Any]]


def send(client_task: ClientTask, payload: Payload | None = None) -> None:
    """Call it before the task is sent: the client gets the task as it is, or with its own tensors of `payload`."""
    task = client_task.task
    data = task.data
    if callable(payload):
        data = make_copy(data)
        DXO(DataKind.WEIGHTS, data=dict(payload(client_task.client.name))).update_shareable(data)
    task._broadcast_data = data
