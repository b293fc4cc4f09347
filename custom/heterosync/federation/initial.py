"""The global state before round 0: made once, at the server, so that all sites start from the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from heterosync.federation.modelfile import PROVISIONED
from heterosync.methods import get_method
from heterosync.methods.base import Method


def initial_state(method: Method) -> dict[str, Tensor]:
    """The shared tensors of a freshly seeded model, on the CPU; empty for methods whose weights stay at home."""
    model = method.build_model()
    state = model.state_dict()
    return {name: state[name].detach().cpu().clone() for name in method.shared_names(model)}


def initial_weights(method: str, training: Mapping[str, Any] | None) -> str | None:
    """What the server's initial state starts from (see `resolved_weights`); None where every site builds its own.

    Raises `UserError` when the server does not have them.
    """
    if get_method(method).weighting == "none":
        return None
    return get_method(method).first_weights(get_method(method).recipe(training))


def own_weights(method: Method, model: nn.Module) -> str | None:
    """What a site's own first weights are, or what its network of `Method.provisioned` is; None where every tensor of
    `model` comes from the server."""
    provisioned = method.provisioned()
    if provisioned is not None:
        return provisioned
    if set(method.shared_names(model)) == set(model.state_dict()):
        return None
    return method.first_weights(method.training)


def provisioned_at(method: Method, reports: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """From check-ins that fit together, for the records: what every site has beside its data; else nothing."""
    if not method.needs_provisioned:
        return {}
    return {PROVISIONED: str(reports[min(reports)]["initial_weights"])}


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values: two states have the same hash when they are equal bit for bit."""
    digest = hashlib.sha256()
    for name in sorted(state):
        array = state[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name} {array.dtype} {array.shape};".encode())
        digest.update(array.reshape(-1).view("uint8").data)
    return digest.hexdigest()
