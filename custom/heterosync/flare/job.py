"""Job folders: configuration (the package too where asked for), written by one builder, never edited by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import heterosync
from heterosync.errors import UserError, nearest
from heterosync.federation.wire import is_site_name
from heterosync.files import explained, write_json, write_text
from heterosync.flare import allowlist, messages
from heterosync.flare.job_readme import readme
from heterosync.methods import get_method, make_method, method_names
from heterosync.training.settings import TrainingSettings

APP = "app"
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
        if isinstance(interval, bool) or not isinstance(interval, (int, float)) or not 0 < interval <= 60:
            raise UserError(f"job option task_request_interval: {interval!r} is not a number of seconds in (0, 60]")
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
    get_method(method)
    made = make_method(method, options.method_settings, options.training_settings())
    if options.anchors_may_differ and not made.uses_anchor:
        raise UserError(f"job option anchors_may_differ: '{method}' has no anchor task with these settings: leave it")
    folder = Path(folder)
    replaces_job(folder)
    write_json(folder / "meta.json", meta(method, options))
    config = folder / APP / "config"
    write_json(config / "config_fed_server.json", server_config(method, options))
    write_json(config / "config_fed_client.json", client_config(method, options))
    write_text(folder / "README.md", readme(made, options, byoc))
    _pack_package(folder / APP / "custom", byoc)
    return folder


def replaces_job(folder: Path | str) -> bool:
    """Whether a job that this builder wrote stands at `folder`. Raises `UserError` when anything else stands there."""
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return False
    try:
        read_learning(folder)
        return True
    except UserError:
        raise UserError(f"{folder} holds files that are no heterosync job: remove them or choose another one") from None


def _pack_package(custom: Path, byoc: bool) -> None:
    with explained(custom):
        if custom.exists():
            shutil.rmtree(custom)
        if byoc:
            package = Path(heterosync.__file__).parent
            shutil.copytree(package, custom / package.name, ignore=shutil.ignore_patterns("__pycache__"))


def export_all(folder: Path | str, options: JobOptions | None = None) -> list[Path]:
    """Write one job folder per method below `folder`."""
    return [build_job(name, Path(folder) / name, options) for name in method_names()]


def meta(method: str, options: JobOptions) -> dict[str, Any]:
    """Content of meta.json. `min_clients` is 1 when all sites are expected: the scheduler cannot know how many."""
    least = options.min_clients or len(options.sites) or 1
    value: dict[str, Any] = {"name": method, "resource_spec": {}, "min_clients": least, "deploy_map": {APP: ["@ALL"]}}
    if options.sites:
        value["mandatory_clients"] = list(options.sites)
    return value


def server_config(method: str, options: JobOptions) -> dict[str, Any]:
    return {
        "format_version": 2,
        "server": {"heart_beat_timeout": 600, "task_request_interval": options.task_request_interval},
        CHUNK: CHUNK_BYTES,
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [
            {"id": "persistor", "path": allowlist.PERSISTOR, "args": _learning(method, options)},
            {"id": "shareable_generator", "path": allowlist.SHAREABLE_GENERATOR, "args": {}},
            {"id": "aggregator", "path": allowlist.AGGREGATOR, "args": {"method": method}},
        ],
        "workflows": [
            {
                "id": "heterosync",
                "path": allowlist.CONTROLLER,
                "args": {
                    **_learning(method, options),
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
    learning = _learning(method, options)
    return {
        "format_version": 2,
        CHUNK: CHUNK_BYTES,
        "executors": [
            {
                "tasks": list(messages.TASKS),
                "executor": {"path": allowlist.EXECUTOR, "args": {**learning, "in_process": options.in_process}},
            }
        ],
        "task_data_filters": [],
        "task_result_filters": [
            {
                "tasks": list(messages.TASKS),
                "filters": [{"path": allowlist.OUTBOUND_FILTER, "args": learning}],
            }
        ],
        "components": [],
    }


def read_learning(job: Path | str) -> dict[str, Any]:
    """{method, method_settings, training} of a job folder that this builder wrote. Raises `UserError` for any other."""
    path = Path(job) / APP / "config" / "config_fed_server.json"
    try:
        workflows = json.loads(path.read_text(encoding="utf-8"))["workflows"]
        args = workflows[0]["args"]
        return {key: args[key] for key in ("method", "method_settings", "training")}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{job} is not a heterosync job folder: write one with `heterosync job export`") from error


def _learning(method: str, options: JobOptions) -> dict[str, Any]:
    """The same three arguments for executor, filter, persistor and controller."""
    return {"method": method, "method_settings": dict(options.method_settings), "training": options.training_dict()}


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"job option {name}: {value!r} is not a whole number of at least {least}")
