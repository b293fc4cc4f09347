"""The classes that a job may name. Every kit, POC workspace and simulator workspace carries exactly this list.

FLARE builds, for a job without own code, only classes on the site's `class_allow_list`. Ours are named one by one, not
as a package prefix, so that a job can reach nothing else of this package; of FLARE's own, the list has the two that our
jobs name, in place of FLARE's default list (executors and validators that know nothing of our filters).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from heterosync.files import write_json

EXECUTOR = "heterosync.flare.executor.HeteroSyncExecutor"
AGGREGATOR = "heterosync.flare.aggregator.EqualWeightAggregator"
CONTROLLER = "heterosync.flare.controller.HeteroSyncController"
PERSISTOR = "heterosync.flare.persistor.GlobalModelPersistor"
OUTBOUND_FILTER = "heterosync.flare.filters.OutboundFilter"
DP_FILTER = "heterosync.flare.dp_filter.NoisyUpdateFilter"
SWARM_EXECUTOR = "heterosync.flare.swarm_site.SwarmExecutor"
SWARM_AGGREGATOR = "heterosync.flare.swarm_site.SwarmAggregator"
SWARM_PERSISTOR = "heterosync.flare.swarm_site.SwarmPersistor"
SWARM_CONTROLLER = "heterosync.flare.swarm.SwarmController"
SERVER_GATE = "heterosync.flare.swarm_site.ServerGate"
PEER_GATE = "heterosync.flare.swarm_site.PeerGate"
SHAREABLE_GENERATOR = (
    "nvflare.app_common.shareablegenerators.full_model_shareable_generator.FullModelShareableGenerator"
)
SWARM_CLIENT = "nvflare.app_common.ccwf.swarm_client_ctl.SwarmClientController"

OUR_CLASSES = (
    EXECUTOR,
    AGGREGATOR,
    CONTROLLER,
    PERSISTOR,
    OUTBOUND_FILTER,
    DP_FILTER,
    SWARM_EXECUTOR,
    SWARM_AGGREGATOR,
    SWARM_PERSISTOR,
    SWARM_CONTROLLER,
    SERVER_GATE,
    PEER_GATE,
)


def class_allow_list() -> list[str]:
    """All that our jobs name."""
    return [*OUR_CLASSES, SHAREABLE_GENERATOR, SWARM_CLIENT]


def simulator_resources() -> dict[str, Any]:
    """Content of `local/resources.json` of a simulator workspace."""
    return {"format_version": 2, "class_allow_list": class_allow_list()}


def prepare_workspace(workspace: Path | str) -> Path:
    """Write `local/resources.json` below a simulator workspace; what else lies in `local/` stays."""
    return write_json(Path(workspace) / "local" / "resources.json", simulator_resources())
