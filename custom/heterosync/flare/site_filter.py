"""The outbound filters as a site's own policy: they stand in `local/privacy.json` and act whatever a job says.

Of a job they take only which of our methods it trains and with which settings, from what it gives to our executor: that
fixes the shared tensors, by registry names of the installed package. A job that runs anything else gets no answer. What
a job says of clipping and noise can make the site's own stricter, never weaker.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.fl_constant import FilterKey, FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.fuel.utils.config_factory import ConfigFactory

from heterosync.errors import UserError, nearest
from heterosync.federation.wire import METRICS, payload_bytes
from heterosync.flare.dp_filter import NOISED, NoisyUpdate
from heterosync.flare.filters import SITE_AUDIT_FILE, OutboundFilter, blocked
from heterosync.flare.jobs import allowlist
from heterosync.flare.jobs.builder import obstacle
from heterosync.flare.swarm_site import PeerGate, ServerGate
from heterosync.methods import make_method, method_names
from heterosync.methods.base import Method

MIB = 2**20
LEARNING = ("method", "method_settings", "training")
#: What may answer tasks at a site: one of our executors, in a swarm beside FLARE's part of it.
PLAIN, SWARM = [allowlist.EXECUTOR], [allowlist.SWARM_EXECUTOR, allowlist.SWARM_CLIENT]


class SitePolicy(OutboundFilter):
    """What the two filters below share.

    methods: methods that the site takes part in; None: all. max_megabytes: largest message, in MiB.
    withhold: metrics that stay here, for example ["n_positive"]. max_rounds: most rounds of a training; None: any.
    max_clip: only clipped updates leave, of at most this L2 norm; None: weights as they are. min_noise: their noise at
    least, as a standard deviation in units of the clip. A job that cannot keep to these gets no answer at its check-in.
    Raises `UserError` for a value that is none of these, and for any other key.
    """

    audit_file = SITE_AUDIT_FILE

    def __init__(
        self,
        methods: Sequence[str] | None = None,
        max_megabytes: float = 1024,
        withhold: Sequence[str] = (),
        max_rounds: int | None = None,
        max_clip: float | None = None,
        min_noise: float = 0.0,
        **unknown: Any,  # refused by name: FLARE would tell a raw TypeError
    ):
        super().__init__("")
        for name in unknown:
            raise UserError(f"local/privacy.json: '{name}' is no key of this filter: {nearest(name, _keys())}")
        for kind, given, known in (("method", methods or (), method_names()), ("metric", withhold, METRICS)):
            if not isinstance(given, (list, tuple)):
                raise UserError(f"local/privacy.json: write the {kind} {given!r} as a list, in brackets")
            for name in given:
                if name not in known:
                    raise UserError(f"local/privacy.json: {kind} '{name}' is not known: {nearest(str(name), known)}")
        limits = {"max_rounds": max_rounds, "max_clip": max_clip, "min_noise": min_noise or None}
        limits = {name: number for name, number in limits.items() if number is not None}
        for name, number in {"max_megabytes": max_megabytes, **limits}.items():
            right = isinstance(number, (int, float)) and not isinstance(number, bool) and 0 < number < math.inf
            if not right:
                raise UserError(f"local/privacy.json: {name} {number!r} is no number above 0")
        if min_noise and max_clip is None:
            raise UserError("local/privacy.json: min_noise without max_clip protects nobody: set max_clip too")
        self._methods, self._max_megabytes, self._withhold = methods, max_megabytes, frozenset(withhold)
        self._max_rounds, self._max_clip, self._min_noise = max_rounds, max_clip, min_noise
        self._swarm = False
        self._update: NoisyUpdate | None = None

    def _prepare(self, fl_ctx: FLContext) -> None:
        if self._method:
            return
        config = job_config(fl_ctx)
        swarm, learning = job_learning(config)
        if self._methods is not None and learning["method"] not in self._methods:
            raise blocked(f"this site takes no part in method {learning['method']} (local/privacy.json)")
        method = make_method(*(learning[name] for name in LEARNING))
        rounds = method.training.rounds
        if self._max_rounds is not None and rounds > self._max_rounds:
            raise blocked(f"the training has {rounds} rounds, local/privacy.json allows {self._max_rounds}")
        if self._max_clip is not None:
            self._check_update(swarm, method)
            clips, noises = job_noise(config)
            clip, noise = min([self._max_clip, *clips]), max([self._min_noise, *noises])
            self._update = NoisyUpdate(clip, noise, **learning)
        self._swarm, (self._method, self._settings, self._training) = swarm, (learning[name] for name in LEARNING)

    @staticmethod
    def _check_update(swarm: bool, method: Method) -> None:
        """Raises `Blocked` when what the job sends is not an update that can be clipped and noised."""
        why = "goes from site to site in a swarm" if swarm else obstacle(method, "dp_clip")
        if why and method.weighting != "none":
            line = "only clipped and noised updates leave this site (local/privacy.json)"
            raise blocked(f"{line}, and method {method.name} {why}")

    def _may_leave(self, tensors: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
        megabytes = payload_bytes(tensors) / MIB
        if megabytes > self._max_megabytes:
            raise blocked(f"{megabytes:.0f} MiB are more than the {self._max_megabytes:g} of local/privacy.json")
        return {
            name: value for name, value in super()._may_leave(tensors, metrics).items() if name not in self._withhold
        }


def _keys() -> list[str]:
    """What the hospital may write under `args`."""
    parameters = inspect.signature(SitePolicy).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]


class SiteOutboundFilter(SitePolicy, ServerGate):
    """The gate to the server, a task result filter. In a swarm no tensor passes it.

    FLARE runs it before the filters of the job: where the policy wants noise, this is what noises.
    """

    def _checked(
        self, task: str, shareable: Shareable, fl_ctx: FLContext
    ) -> tuple[dict[str, Any], dict[str, Any], Shareable]:
        gate = ServerGate if self._swarm else OutboundFilter
        tensors, scalars, reply = gate._checked(self, task, shareable, fl_ctx)
        if tensors and self._update is not None:
            reply = self._update(reply, fl_ctx)
            fl_ctx.set_prop(NOISED, True, private=True, sticky=False)
        return tensors, scalars, reply


class SitePeerGate(SitePolicy, PeerGate):
    """The gate to other sites, which only a swarm opens: a task data filter of direction "inout"."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        if fl_ctx.get_prop(FLContextKey.FILTER_DIRECTION) == FilterKey.OUT:
            self._prepare(fl_ctx)
            if not self._swarm:
                raise blocked("this job is no swarm: nothing goes to other sites")
        return PeerGate.process(self, shareable, fl_ctx)


def job_config(fl_ctx: FLContext) -> dict[str, Any]:
    """What the job configures at this site."""
    folder = fl_ctx.get_engine().get_workspace().get_app_config_dir(fl_ctx.get_job_id())
    config = ConfigFactory.load_config("config_fed_client.json", [folder])
    return config.to_dict() if config else {}


def job_learning(config: Mapping[str, Any]) -> tuple[bool, dict[str, Any]]:
    """(whether it is a swarm, {method, method_settings, training, training_id} that the job gives to our executor).

    Raises `Blocked` for a job that runs anything else.
    """
    executors = [entry.get("executor", {}) for entry in config.get("executors", [])]
    paths = [executor.get("path") for executor in executors]
    if paths not in (PLAIN, SWARM):
        raise blocked("the job runs something else than the executor of heterosync")
    args = executors[0].get("args", {})
    learning = {"method": str(args.get("method", "")), **{name: args.get(name) or {} for name in LEARNING[1:]}}
    return paths == SWARM, {**learning, "training_id": str(args.get("training_id") or "")}


def job_noise(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """(clips, noises) of the job's own noise filters; there is one in jobs that are exported with `dp_clip`."""
    filters = [part for chain in config.get("task_result_filters", []) for part in chain.get("filters", [])]
    args = [part.get("args", {}) for part in filters if part.get("path") == allowlist.DP_FILTER]
    return [float(arg["clip"]) for arg in args], [float(arg["noise"]) for arg in args]
