"""Job folders: configuration (the package too where asked for), written by one builder, never edited by hand."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import heterosync
from heterosync.errors import UserError
from heterosync.files import explained, write_json, write_text
from heterosync.flare import messages
from heterosync.flare.jobs import allowlist
from heterosync.flare.jobs import swarm as swarm_job
from heterosync.flare.jobs.folder import APP, replaces_job
from heterosync.flare.jobs.options import JobOptions
from heterosync.flare.jobs.readme import readme
from heterosync.methods import get_method, make_method, method_names
from heterosync.methods.base import SCALAR_LEAVES, Method

#: Methods that have a committed swarm job too.
SWARMS = ("hsl",)
#: FLARE asks for tensors in pieces of 2 MiB by default; larger ones make a 90 MiB model a fifth quicker to send.
CHUNK, CHUNK_BYTES = "tensor_download_chunk_size", 8 * 2**20


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
        if name in SWARMS and chosen.topology is None and not chosen.min_clients and chosen.dp_clip is None:
            jobs.append((name, replace(chosen, topology="swarm")))
    return jobs


def job_name(method: str, options: JobOptions) -> str:
    """Name of a job and its folder: the method, with the variant where it is one ("hsl_swarm", "hsl_dp")."""
    own = get_method(method).topology
    variant = "_swarm" if _topology(method, options) != own else "_dp" if options.dp_clip is not None else ""
    return method + variant


def _topology(method: str, options: JobOptions) -> str:
    return options.topology or get_method(method).topology


def check_job(name: str, options: JobOptions) -> Method:
    """The method that the job trains. Raises `UserError` for settings that are unknown or make no sense together."""
    method = make_method(name, options.method_settings, options.training_dict())
    if options.anchors_may_differ and not method.uses_anchor:
        raise UserError(f"job option anchors_may_differ: '{name}' has no anchor task with these settings: leave it")
    topology = _topology(name, options)
    if topology != "swarm" == method.topology:
        raise UserError(f"job option topology: method {name} is fused by the sites: leave it out, or take fedavg")
    variants = {"topology": topology != method.topology, "dp_clip": options.dp_clip is not None}
    for option in [option for option, used in variants.items() if used]:
        why = obstacle(method, option)
        if why:
            raise UserError(f"job option {option}: method {name} {why}: leave it out")
    if topology == "swarm":
        if options.min_clients:
            raise UserError("job option min_clients: a swarm needs every site in every round: leave it out")
        for option in ("wait_after_min", "uploads_to_disk"):
            if getattr(options, option) != getattr(JobOptions, option):
                raise UserError(f"job option {option}: the server of a swarm gets no models to wait for: leave it out")
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
    if option == "dp_clip" and method.topology == "swarm":
        return "goes from site to site"
    if option == "dp_clip" and not method.only_updates:
        return "sends more than an update of what a site received"
    told = [name for name in method.scalars if SCALAR_LEAVES[name].startswith("W2")]
    if option == "dp_clip" and told:
        return f"goes by {told[0]}, a statistic of the site's labels, to which no noise is added"
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
    parts = swarm_job.server_parts if _topology(method, options) == "swarm" else _server_parts
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
    parts = swarm_job.client_parts if _topology(method, options) == "swarm" else _client_parts
    return {"format_version": 2, CHUNK: CHUNK_BYTES, **parts(_learning(method, options), options)}


def _client_parts(learning: dict[str, Any], options: JobOptions) -> dict[str, Any]:
    filters = [{"path": allowlist.OUTBOUND_FILTER, "args": learning}]
    if options.dp_clip is not None:
        privacy = {"clip": options.dp_clip, "noise": options.dp_noise, **learning}
        filters.insert(0, {"path": allowlist.DP_FILTER, "args": privacy})
    answered = [*messages.TASKS, messages.EXCHANGE] if get_method(learning["method"]).split else list(messages.TASKS)
    return {
        "executors": [
            {
                "tasks": list(messages.TASKS),
                "executor": {"path": allowlist.EXECUTOR, "args": {**learning, "in_process": options.in_process}},
            }
        ],
        "task_data_filters": [],
        "task_result_filters": [{"tasks": answered, "filters": filters}],
        "components": [],
    }


def _learning(method: str, options: JobOptions) -> dict[str, Any]:
    """The same three arguments for executor, filter, persistor, aggregator and controller."""
    return {"method": method, "method_settings": dict(options.method_settings), "training": options.training_dict()}
