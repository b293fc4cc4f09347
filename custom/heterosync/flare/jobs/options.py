"""What may differ between two jobs of the same method; the builder is builder.py."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from heterosync.errors import UserError, nearest
from heterosync.federation.wire import is_site_name

TOPOLOGIES = ("star", "swarm")


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
    #: who fuses: "star", the server; "swarm", the sites among themselves; None leaves that to the method
    topology: str | None = None
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
        if self.topology not in (None, *TOPOLOGIES):
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

    def training_dict(self) -> dict[str, Any]:
        return dict(self.training) if self.rounds is None else {**self.training, "rounds": self.rounds}


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"job option {name}: {value!r} is not a whole number of at least {least}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
