"""States of the published HSL code <-> states of `MMoE`.

The published network (MMOE_ResNet18.py of MedAI-UAIX/HeteroSync_Learning-HSL, built with two tasks) keeps twelve
separate expert modules; ours stacks them. All other tensors are only renamed. The names are those of that file; no
trained state has been published with it, so every name and shape is checked on loading.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from heterosync.errors import UserError
from heterosync.models.encoder import read_state

#: published prefix -> our prefix, for tensors that are only renamed (the first match counts)
PREFIXES: tuple[tuple[str, str], ...] = (
    ("encoding_1.net.", "encoders.0."),
    ("encoding_2.net.", "encoders.1."),
    ("encoding_1.myfc.", "encoders.0.fc."),
    ("encoding_2.myfc.", "encoders.1.fc."),
    ("down1.", "skips.0."),
    ("down2.", "skips.1."),
    ("gates.0.0.", "gates.0."),
    ("gates.1.0.", "gates.1."),
    ("towers.", "towers."),
)

#: published tensor of expert j -> our stacked tensor, whose entry j it is
EXPERTS: tuple[tuple[str, str], ...] = (
    ("experts.{j}.fc1.weight", "experts.weight1"),
    ("experts.{j}.fc1.bias", "experts.bias1"),
    ("experts.{j}.fc2.weight", "experts.weight2"),
    ("experts.{j}.fc2.bias", "experts.bias2"),
)


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our MMoE state in the published layout."""
    stacked = {ours: theirs for theirs, ours in EXPERTS}
    # longest first: "encoders.0.fc." before "encoders.0."
    prefixes = sorted(((ours, theirs) for theirs, ours in PREFIXES), key=lambda pair: -len(pair[0]))
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in stacked:
            result.update({stacked[name].format(j=j): part.clone() for j, part in enumerate(value)})
            continue
        ours, theirs = next(pair for pair in prefixes if name.startswith(pair[0]))
        result[theirs + name[len(ours) :]] = value
    return result


def from_published(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A published state in our layout; `reference` is a state of the `MMoE` that shall hold it.

    Raises `UserError` that names the first tensor that is missing, unknown or of another shape.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}  # nn.DataParallel's prefix
    wanted = to_published(reference)
    for name, value in wanted.items():
        if name not in state:
            raise UserError(f"published model: tensor '{name}' is missing; expected a state of the published MMoE")
        if state[name].shape != value.shape:
            found, needed = tuple(state[name].shape), tuple(value.shape)
            raise UserError(
                f"published model: tensor '{name}' is {found}, the network needs {needed}: check its settings"
            )
    unknown = sorted(set(state) - set(wanted))
    if unknown:
        raise UserError(
            f"published model: unknown tensor '{unknown[0]}' (of {len(unknown)}); expected a published MMoE"
        )
    result: dict[str, Tensor] = {}
    for name, value in reference.items():
        template = next((theirs for theirs, ours in EXPERTS if ours == name), None)
        if template is not None:
            result[name] = torch.stack([state[template.format(j=j)] for j in range(len(value))])
        else:
            (theirs,) = to_published({name: value})
            result[name] = state[theirs]
    return result


def load_published(source: Path | str | Mapping[str, Tensor], model: nn.Module) -> None:
    """Load a published state (a file or a dictionary) into an `MMoE`. Raises `UserError`."""
    state = source if isinstance(source, Mapping) else read_state(source)
    model.load_state_dict(from_published(state, model.state_dict()))
