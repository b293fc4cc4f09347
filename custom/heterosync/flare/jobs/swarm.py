"""What a job folder says when the sites fuse among themselves; the builder is builder.py."""

from __future__ import annotations

from typing import Any

from heterosync.flare import messages
from heterosync.flare.jobs import allowlist
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.swarm_site import CONTROL_TASKS, PEER_TASKS

ALL = 10**6  # more than any number of sites: FLARE then waits for every one


def server_parts(learning: dict[str, Any], options: JobOptions) -> dict[str, Any]:
    """`components` and `workflows` of the server: no weights, so no persistor and no aggregator."""
    args = {
        **learning,
        "train_timeout": options.train_timeout,
        "task_timeout": options.task_timeout,
        "anchors_may_differ": options.anchors_may_differ,
    }
    return {"components": [], "workflows": [{"id": "swarm", "path": allowlist.SWARM_CONTROLLER, "args": args}]}


def client_parts(learning: dict[str, Any], options: JobOptions) -> dict[str, Any]:
    """`executors`, filters and `components` of every site."""
    patience = {"learn_task_ack_timeout": options.task_timeout, "final_result_ack_timeout": options.task_timeout}
    if options.train_timeout:
        patience["learn_task_timeout"] = options.train_timeout
    swarm = {
        "learn_task_name": messages.TRAIN,
        "persistor_id": "persistor",
        "shareable_generator_id": "shareable_generator",
        "aggregator_id": "aggregator",
        "min_responses_required": ALL,
        "learn_task_check_interval": 0.1,
        "request_to_submit_result_interval": 0.2,
        "memory_gc_rounds": 0,
        **patience,
    }
    own = [*messages.TASKS, messages.REPORT]
    return {
        "executors": [
            {
                "tasks": own,
                "executor": {"path": allowlist.SWARM_EXECUTOR, "args": {**learning, "in_process": options.in_process}},
            },
            {"tasks": ["swarm_*"], "executor": {"path": allowlist.SWARM_CLIENT, "args": swarm}},
        ],
        "task_data_filters": [
            {
                "tasks": list(PEER_TASKS),
                "direction": "inout",
                "filters": [{"path": allowlist.PEER_GATE, "args": learning}],
            }
        ],
        "task_result_filters": [
            {
                "tasks": [*own, *CONTROL_TASKS, *PEER_TASKS],
                "filters": [{"path": allowlist.SERVER_GATE, "args": learning}],
            }
        ],
        "components": [
            {"id": "persistor", "path": allowlist.SWARM_PERSISTOR, "args": learning},
            {"id": "shareable_generator", "path": allowlist.SHAREABLE_GENERATOR, "args": {}},
            {"id": "aggregator", "path": allowlist.SWARM_AGGREGATOR, "args": learning},
        ],
    }
