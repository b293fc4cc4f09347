"""The site's training state between rounds, on disk: whole at any moment, readable without running code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heterosync.errors import SiteError
from heterosync.files import write_stream

FORMAT = 1
_KEYS = {
    "format",
    "method",
    "site",
    "round",
    "request",
    "state",
    "metrics",
    "epochs",
    "moments",
    "start",
    "moments_before",
}
_LATER = {"trace"}  # of records that an earlier version wrote without it


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state on the CPU, in plain memory layout."""
    return {
        name: torch.empty_like(value, device="cpu", memory_format=torch.contiguous_format).copy_(value)
        for name, value in model.state_dict().items()
    }


def request_digest(shared: Mapping[str, Tensor] | None, *context: object) -> str:
    """SHA-256 over the received tensors and the context: tells a repeated request from a new one of the same round."""
    digest = hashlib.sha256(repr(context).encode())
    for name in sorted(shared or {}):
        value = shared[name].detach().cpu().contiguous()  # type: ignore[index]
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_state(path: Path, record: dict[str, Any]) -> None:
    write_stream(path, lambda file: torch.save({"format": FORMAT, **record}, file))


def load_state(path: Path, method: str, site: str) -> dict[str, Any] | None:
    """The record at `path`, or None if there is none. Raises `UserError` if it is damaged or of another run."""
    if not path.is_file():
        return None
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SiteError(f"site {site}: resume state {path} is damaged: delete it; training then starts anew") from error
    if not isinstance(record, dict) or not _KEYS <= set(record) <= _KEYS | _LATER or record["format"] != FORMAT:
        raise SiteError(f"site {site}: {path} is no resume state of this version: delete it; training then starts anew")
    for key, wanted in (("method", method), ("site", site)):
        if record[key] != wanted:
            raise SiteError(
                f"site {site}: resume state {path} is of {key} '{record[key]}', not '{wanted}': "
                "choose another work folder"
            )
    return record
