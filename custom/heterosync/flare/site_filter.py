"""The outbound filters as a site's own policy: they stand in `local/privacy.json` and act whatever a job says.

Of a job they take only which of our methods it trains and with which settings, from what it gives to our executor: that
fixes the shared tensors, by registry names of the installed package. A job that runs anything else gets no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils.config_factory import ConfigFactory

from heterosync.errors import HeteroSyncError, nearest
from heterosync.federation.wire import METRICS, payload_bytes
from heterosync.flare import allowlist
from heterosync.flare.filters import OutboundFilter, blocked
from heterosync.flare.swarm_site import PeerGate, ServerGate
from heterosync.methods import method_names

AUDIT_FILE = "audit_site.jsonl"
MIB = 2**20
LEARNING = ("method", "method_settings", "training")
#: What may answer tasks at a site: one of our executors, in a swarm beside FLARE's part of it.
PLAIN, SWARM = [allowlist.EXECUTOR], [allowlist.SWARM_EXECUTOR, allowlist.SWARM_CLIENT]


class SitePolicy(OutboundFilter):
    """What the two filters below share.

    methods: methods that the site takes part in; None: all. max_megabytes: largest message, in MiB.
    withhold: metrics that stay here, for example ["n_positive"].
    """

    audit_file = AUDIT_FILE

    def __init__(self, methods: Sequence[str] | None = None, max_megabytes: float = 1024, withhold: Sequence[str] = ()):
        super().__init__("")
        for kind, given, known in (("method", methods or (), method_names()), ("metric", withhold, METRICS)):
            for name in given:
                if name not in known:
                    raise HeteroSyncError(f"local/privacy.json: {kind} '{name}' is not known: {nearest(name, known)}")
        self._methods, self._max_megabytes, self._withhold = methods, max_megabytes, frozenset(withhold)
        self._swarm = False

    def _prepare(self, fl_ctx: FLContext) -> None:
        if self._method:
            return
        swarm, learning = job_learning(fl_ctx)
        if self._methods is not None and learning["method"] not in self._methods:
            raise blocked(f"this site takes no part in method {learning['method']} (local/privacy.json)")
        self._swarm, (self._method, self._settings, self._training) = swarm, (learning[name] for name in LEARNING)

    def _may_leave(self, tensors: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
        megabytes = payload_bytes(tensors) / MIB
        if megabytes > self._max_megabytes:
            raise blocked(f"{megabytes:.0f} MiB are more than the {self._max_megabytes:g} of local/privacy.json")
        return {
            name: value for name, value in super()._may_leave(tensors, metrics).items() if name not in self._withhold
        }


class SiteOutboundFilter(SitePolicy, ServerGate):
    """The gate to the server, a task result filter. In a swarm no tensor passes it."""

    def _checked(self, task: str, shareable: Shareable) -> tuple[dict[str, Any], dict[str, Any], Shareable]:
        gate = ServerGate if self._swarm else OutboundFilter
        return gate._checked(self, task, shareable)


class SitePeerGate(SitePolicy, PeerGate):
    """The gate to other sites, which only a swarm opens: a task data filter of direction "inout"."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        if fl_ctx.get_prop(FLContextKey.FILTER_DIRECTION) == FilterKey.OUT:
            self._prepare(fl_ctx)
            if not self._swarm:
                raise blocked("this job is no swarm: nothing goes to other sites")
        return PeerGate.process(self, shareable, fl_ctx)


def job_learning(fl_ctx: FLContext) -> tuple[bool, dict[str, Any]]:
    """(whether it is a swarm, {method, method_settings, training} that the job gives to our executor).

    Raises `Blocked` for a job that runs anything else.
    """
    folder = fl_ctx.get_engine().get_workspace().get_app_config_dir(fl_ctx.get_job_id())
    config = ConfigFactory.load_config("config_fed_client.json", [folder])
    executors = [entry.get("executor", {}) for entry in (config.to_dict() if config else {}).get("executors", [])]
    paths = [executor.get("path") for executor in executors]
    if paths not in (PLAIN, SWARM):
        raise blocked("the job runs something else than the executor of heterosync")
    args = executors[0].get("args", {})
    learning = {"method": str(args.get("method", "")), **{name: args.get(name) or {} for name in LEARNING[1:]}}
    return paths == SWARM, learning
