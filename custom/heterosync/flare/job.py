"""Job folders: configuration (the package too where asked for), written by one builder, never edited by hand."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import heterosync
from heterosync.errors import UserError, nearest
from heterosync.federation.wire import is_site_name
from heterosync.files import explained, write_json, write_text
from heterosync.flare import allowlist, messages, swarm_job
from heterosync.flare.job_folder import APP, replaces_job
from heterosync.flare.job_readme import readme
from heterosync.methods import get_method, make_method, method_names
from heterosync.methods.base import Method
from heterosync.training.settings import TrainingSettings

TOPOLOGIES = ("star", "swarm")
#: Methods that have a committed swarm job too.
SWARMS = ("hsl",)
#: FLARE asks for tensors in pieces of 2 MiB by default; larger ones make a 90 MiB model a fifth quicker to send.
CHUNK, CHUNK_BYTES = "tensor_download_chunk_size", 8 * 2**20


@dataclass(frozen=True)
class JobOptions:
    """What may differ between two jobs of the same method. What differs between sites is in site.yaml, never here.

    Counts are sites, times are seconds. Raises `UserError` naming the option when a value cannot be used.
    """

    #: rounds of training and fusion; None takes the default of the training settings
    rounds: int | None = None
    #: sites a round needs; 0 means all sites that take part in the job
    min_clients: int = 0
    #: how long a round waits for the other sites after `min_clients` have answered
    wait_after_min: int = 600
    #: longest time a site may take for the training of one round; 0 waits for ever
    train_timeout: int = 0
    #: longest time for the check-in and for each validation; the first one includes reading all images
    task_timeout: int = 3600
    #: pause between two questions of a site "is there a task?"
    task_request_interval: float = 0.05
    #: sites that must take part, by name; empty leaves that to min_clients
    sites: tuple[str, ...] = ()
    #: train inside the client job process instead of a process of its own
    in_process: bool = False
    #: let sites with different anchor packs train together (the ablation without a shared anchor task)
    anchors_may_differ: bool = False
    #: the server receives models into files: its memory does not grow with the number of sites
    uploads_to_disk: bool = True
    #: who fuses: "star", the server; "swarm", the sites among themselves
    topology: str = "star"
    #: largest L2 norm of a site's update in a round; longer ones are shortened; None sends the weights as they are
    dp_clip: float | None = None
    #: standard deviation of the noise on every element of an update, in units of `dp_clip`
    dp_noise: float = 0.0
    #: training settings that differ from the defaults (see `heterosync job describe`)
    training: dict[str, Any] = field(default_factory=dict)
    #: settings of the method that differ from the defaults
    method_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("min_clients", "wait_after_min", "train_timeout", "task_timeout"):
            _whole(name, getattr(self, name), least=0)
        if self.rounds is not None:
            _whole("rounds", self.rounds, least=1)
        interval = self.task_request_interval
        if not _is_number(interval) or not 0 < interval <= 60:
            raise UserError(f"job option task_request_interval: {interval!r} is not a number of seconds in (0, 60]")
        self._check_privacy()
        if self.topology not in TOPOLOGIES:
            raise UserError(f"job option topology: '{self.topology}' is not one of {', '.join(TOPOLOGIES)}")
        for name in ("in_process", "anchors_may_differ", "uploads_to_disk"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"job option {name}: {getattr(self, name)!r} is not true or false")
        for name in ("training", "method_settings"):
            if not isinstance(getattr(self, name), dict):
                raise UserError(f"job option {name}: {getattr(self, name)!r} is not a table of settings")
        if isinstance(self.sites, str) or not all(isinstance(site, str) for site in self.sites):
            raise UserError(f"job option sites: {self.sites!r} is not a list of site names")
        object.__setattr__(self, "sites", tuple(self.sites))
        for site in self.sites:
            if not is_site_name(site):
                raise UserError(f"job option sites: '{site}' cannot be the name of a site (letters, digits, . _ -)")
        if len(set(self.sites)) != len(self.sites):
            raise UserError("job option sites: a site is named twice")
        if self.sites and self.min_clients > len(self.sites):
            raise UserError(f"job option min_clients: {self.min_clients}, but the job names {len(self.sites)} sites")

    def _check_privacy(self) -> None:
        clip, noise = self.dp_clip, self.dp_noise
        if clip is not None and (not _is_number(clip) or not 0 < clip < math.inf):
            raise UserError(f"job option dp_clip: {clip!r} is not a number above 0")
        if not _is_number(noise) or not 0 <= noise < math.inf:
            raise UserError(f"job option dp_noise: {noise!r} is not a number of at least 0")
        if noise and clip is None:
            raise UserError("job option dp_noise: noise without clipping protects nobody: set dp_clip too")
        if clip is not None and self.topology == "swarm":
            raise UserError("job option dp_clip: not in a swarm in this release: choose topology star")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> JobOptions:
        """Raises `UserError` with the nearest name for an unknown option."""
        known = [item.name for item in fields(cls)]
        for name in values:
            if name not in known:
                raise UserError(f"job option '{name}' is not known: {nearest(str(name), known)}")
        return cls(**values)

    def training_settings(self) -> TrainingSettings:
        return TrainingSettings.from_dict(self.training_dict())

    def training_dict(self) -> dict[str, Any]:
        return dict(self.training) if self.rounds is None else {**self.training, "rounds": self.rounds}


def build_job(method: str, folder: Path | str, options: JobOptions | None = None, byoc: bool = False) -> Path:
    """Write the job folder of `method` at `folder`: meta.json, app/config/config_fed_{server,client}.json, README.md.

    byoc: pack this package into `app/custom`, for alliances whose sites let a job bring its own code; without it, what
    an earlier job of that kind left there is removed.

    Every setting is checked before anything is written; an earlier job at `folder` is replaced. Raises `UserError`,
    also when other files stand there.
    """
    options = options or JobOptions()
    made = check_job(method, options)
    folder = Path(folder)
    replaces_job(folder)
    write_json(folder / "meta.json", meta(method, options))
    config = folder / APP / "config"
    write_json(config / "config_fed_server.json", server_config(method, options))
    write_json(config / "config_fed_client.json", client_config(method, options))
    write_text(folder / "README.md", readme(made, options, byoc))
    _pack_package(folder / APP / "custom", byoc)
    return folder


def _pack_package(custom: Path, byoc: bool) -> None:
    with explained(custom):
        if custom.exists():
            shutil.rmtree(custom)
        if byoc:
            package = Path(heterosync.__file__).parent
            shutil.copytree(package, custom / package.name, ignore=shutil.ignore_patterns("__pycache__"))


def all_jobs(options: Mapping[str, JobOptions] | None = None) -> list[tuple[str, JobOptions]]:
    """Every method with its options (default ones where missing), and the swarm of `SWARMS` where these allow one."""
    jobs = []
    for name in method_names():
        chosen = (options or {}).get(name, JobOptions())
        jobs.append((name, chosen))
        if name in SWARMS and chosen.topology == "star" and not chosen.min_clients and chosen.dp_clip is None:
            jobs.append((name, replace(chosen, topology="swarm")))
    return jobs


def job_name(method: str, options: JobOptions) -> str:
    """Name of a job and its folder: the method, with the variant where it is one ("hsl_swarm", "hsl_dp")."""
    variant = "_swarm" if options.topology == "swarm" else "_dp" if options.dp_clip is not None else ""
    return method + variant


def check_job(name: str, options: JobOptions) -> Method:
    """The method that the job trains. Raises `UserError` for settings that are unknown or make no sense together."""
    get_method(name)
    method = make_method(name, options.method_settings, options.training_settings())
    if options.anchors_may_differ and not method.uses_anchor:
        raise UserError(f"job option anchors_may_differ: '{name}' has no anchor task with these settings: leave it")
    variants = {"topology": options.topology != "star", "dp_clip": options.dp_clip is not None}
    for option in [option for option, used in variants.items() if used]:
        why = obstacle(method, option)
        if why:
            raise UserError(f"job option {option}: method {name} {why}: leave it out")
    if options.topology == "swarm":
        if options.min_clients:
            raise UserError("job option min_clients: a swarm needs every site in every round: leave it out")
        if method.training.early_stop:
            raise UserError("training setting early_stop: a swarm runs all its rounds: leave it out")
    return method


def obstacle(method: Method, option: str) -> str | None:
    """Why a method cannot be trained by a swarm (`option` "topology") or with noised updates ("dp_clip"); else None."""
    if method.weighting == "none":
        return "keeps its weights at the sites"
    if method.pooled:
        return "is no federation"
    if option == "topology" and method.server_half:
        return "needs a server that does more than take the mean"
    if option == "topology" and method.personal:
        return "makes a model for each site, which a swarm does not test in this release"
    if option == "dp_clip" and not method.only_updates:
        return "sends more than an update of what a site received"
    return None


def meta(method: str, options: JobOptions) -> dict[str, Any]:
    """Content of meta.json. `min_clients` is 1 when all sites are expected: the scheduler cannot know how many."""
    least = options.min_clients or len(options.sites) or 1
    name = job_name(method, options)
    value: dict[str, Any] = {"name": name, "resource_spec": {}, "min_clients": least, "deploy_map": {APP: ["@ALL"]}}
    if options.sites:
        value["mandatory_clients"] = list(options.sites)
    return value


def server_config(method: str, options: JobOptions) -> dict[str, Any]:
    parts = swarm_job.server_parts if options.topology == "swarm" else _server_parts
    return {
        "format_version": 2,
        "server": {"heart_beat_timeout": 600, "task_request_interval": options.task_request_interval},
        CHUNK: CHUNK_BYTES,
        "task_data_filters": [],
        "task_result_filters": [],
        **parts(_learning(method, options), options),
    }


def _server_parts(learning: dict[str, Any], options: JobOptions) -> dict[str, Any]:
    return {
        "components": [
            {"id": "persistor", "path": allowlist.PERSISTOR, "args": learning},
            {"id": "shareable_generator", "path": allowlist.SHAREABLE_GENERATOR, "args": {}},
            {"id": "aggregator", "path": allowlist.AGGREGATOR, "args": learning},
        ],
        "workflows": [
            {
                "id": "heterosync",
                "path": allowlist.CONTROLLER,
                "args": {
                    **learning,
                    "min_clients": options.min_clients,
                    "wait_time_after_min_received": options.wait_after_min,
                    "train_timeout": options.train_timeout,
                    "task_timeout": options.task_timeout,
                    "anchors_may_differ": options.anchors_may_differ,
                    "uploads_to_disk": options.uploads_to_disk,
                },
            }
        ],
    }


def client_config(method: str, options: JobOptions) -> dict[str, Any]:
    parts = swarm_job.client_parts if options.topology == "swarm" else _client_parts
    return {"format_version": 2, CHUNK: CHUNK_BYTES, **parts(_learning(method, options), options)}


def _client_parts(learning: dict[str, Any], options: JobOptions) -> dict[str, Any]:
    filters = [{"path": allowlist.OUTBOUND_FILTER, "args": learning}]
    if options.dp_clip is not None:
        privacy = {"clip": options.dp_clip, "noise": options.dp_noise, **learning}
        filters.insert(0, {"path": allowlist.DP_FILTER, "args": privacy})
    return {
        "executors": [
            {
                "tasks": list(messages.TASKS),
                "executor": {"path": allowlist.EXECUTOR, "args": {**learning, "in_process": options.in_process}},
            }
        ],
        "task_data_filters": [],
        "task_result_filters": [{"tasks": list(messages.TASKS), "filters": filters}],
        "components": [],
    }


def _learning(method: str, options: JobOptions) -> dict[str, Any]:
    """The same three arguments for executor, filter, persistor, aggregator and controller."""
    return {"method": method, "method_settings": dict(options.method_settings), "training": options.training_dict()}


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"job option {name}: {value!r} is not a whole number of at least {least}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
