"""The file that holds a model, global or a site's own: a plain dictionary, safe to load, with its settings."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heterosync import __version__
from heterosync.errors import UserError
from heterosync.files import link_file, write_stream
from heterosync.methods import get_method, make_method
from heterosync.methods.base import Method

FORMAT = "heterosync model 1"
#: The global models of a run folder: after the last round, and the one with the best mean validation AUC so far.
LAST_MODEL, BEST_MODEL = "last_model.pt", "best_model.pt"
#: name of the first weights in a model file's `versions`
INITIAL_WEIGHTS = "initial_weights"
#: The same for what the sites have beside their data (`Method.provisioned`), for methods with such a thing.
PROVISIONED = "provisioned"
#: Before the names of the server's tensors among the assets of a model file.
PREFIX = "server."
#: A site's own best model in its work folder.
OWN_BEST = "own_best.pt"


@dataclass(frozen=True)
class ModelFile:
    """A model and what is needed to use it.

    state: the shared tensors, or all of a model that stays at its site. labels: names of class 0 and 1. round: how many
    rounds made it. assets: further tensors, such as the uint8 partner images (n, c, h, w) that predicting needs for the
    `sat_index` and `sat_mean` readings, or what the server remembers from round to round (server.py). versions: of
    heterosync and torch, under `initial_weights` what the first round started from, and under `provisioned` the frozen
    network that the model goes with.
    """

    method: str
    method_settings: dict[str, Any]
    training: dict[str, Any]
    labels: tuple[str, ...]
    round: int
    state: dict[str, Tensor]
    assets: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    path: Path | None = None

    def build(self) -> tuple[Method, nn.Module]:
        """The method and its model with these weights, in evaluation mode.

        Raises `UserError` where they misfit, or where the frozen network that they go with is another one here.
        """
        method, model = self._made()
        own, shared = set(model.state_dict()), set(method.shared_names(model))
        expected = shared or own  # a model that never leaves its site is whole
        if method.personal:
            of_server = shared != own or any(name.startswith(PREFIX) for name in self.assets)
            if shared and set(self.state) == shared and of_server:
                raise UserError(f"{self._name()}: it is only what the sites share: take a site's own {OWN_BEST}")
            expected = own
        self._check(model, expected)
        wanted, here = self.versions.get(PROVISIONED), method.provisioned()
        if wanted is not None and wanted != here:
            raise UserError(f"{self._name()}: it goes with the frozen network {wanted}, here is {here}: get that file")
        model.load_state_dict(self.state, strict=False)
        return method, model.eval()

    def check_shared(self) -> None:
        """Raises `UserError` when this is not a global state of its method, from which its sites could go on."""
        method, model = self._made()
        self._check(model, set(method.shared_names(model)))

    def _made(self) -> tuple[Method, nn.Module]:
        method = make_method(self.method, self.method_settings, self.training)
        return method, method.build_model(weights="none")  # its values are in this file

    def _check(self, model: nn.Module, expected: set[str]) -> None:
        own = model.state_dict()
        for kind, names in (("lacks", expected - set(self.state)), ("has unknown", set(self.state) - expected)):
            if names:
                raise UserError(f"{self._name()}: {kind} tensor '{min(names)}' ({len(names)} in all): use a whole file")
        for name, value in self.state.items():
            if value.shape != own[name].shape:
                shapes = f"{list(value.shape)}, not {list(own[name].shape)}"
                raise UserError(f"{self._name()}: tensor '{name}' has shape {shapes}: the settings in it do not fit")

    def _name(self) -> str:
        return f"model file {self.path}" if self.path else "model file"


def save_model(
    path: Path | str,
    method: str,
    settings: Any,
    training: Any,
    state: Mapping[str, Any],
    labels: Sequence[str] = (),
    round_: int = 0,
    extra: Mapping[str, Tensor] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write a model file whole or not at all; `settings` and `training` may be dictionaries or settings objects.

    versions: replace what is noted of this machine and moment; a model written again keeps the `versions` of its file.
    """
    content = {
        "format": FORMAT,
        "method": method,
        "method_settings": _plain(settings),
        "training": _plain(training),
        "labels": list(labels),
        "round": int(round_),
        "state": {name: torch.as_tensor(value).detach().cpu() for name, value in state.items()},
        "assets": dict(extra or {}),
        "versions": {**_made_here(method, _plain(training)), **(versions or {})},
    }
    return write_stream(path, lambda file: torch.save(content, file))


def load_model(path: Path | str, method: str | None = None) -> ModelFile:
    """Read a model file without running anything stored in it.

    Raises `UserError` when the file is missing, cut off, of another kind, or not of `method` (when given).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"model file {path} does not exist: give the path of a best_model.pt or last_model.pt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(f"model file {path} is cut off or no model file: copy it again from the run folder") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a model file of heterosync (expected '{FORMAT}'): give a best_model.pt")
    try:
        model = ModelFile(
            method=str(content["method"]),
            method_settings=dict(content["method_settings"]),
            training=dict(content["training"]),
            labels=tuple(content["labels"]),
            round=int(content["round"]),
            state=dict(content["state"]),
            assets=dict(content["assets"]),
            versions=dict(content["versions"]),
            path=path,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"model file {path} is damaged ({error}): copy it again from the run folder") from error
    if method is not None and model.method != method:
        raise UserError(f"model file {path} holds a model of method '{model.method}', not '{method}'")
    return model


def keep_as_best(folder: Path) -> None:
    """Make the best model of a run folder what its last one is now; nothing where there is none yet."""
    if (folder / LAST_MODEL).exists():
        link_file(folder / LAST_MODEL, folder / BEST_MODEL)


def _made_here(method: str, training: Mapping[str, Any]) -> dict[str, str]:
    """What made a model, and from which weights it started (see `resolved_weights`; "unknown": they are not here)."""
    made = get_method(method)
    try:
        weights = made.first_weights(made.recipe(training))
    except UserError:
        weights = "unknown"
    return {"heterosync": __version__, "torch": str(torch.__version__), INITIAL_WEIGHTS: weights}


def _plain(settings: Any) -> dict[str, Any]:
    """A settings object or dictionary as plain values; tuples become lists, as in JSON."""
    values = asdict(settings) if is_dataclass(settings) and not isinstance(settings, type) else dict(settings or {})
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
