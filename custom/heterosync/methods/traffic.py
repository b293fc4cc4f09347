"""How much a method sends."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import nn

from heterosync.methods.base import Method


def bytes_per_round(method: Method, model: nn.Module) -> int:
    """Bytes of the tensors that a site sends after one round, without message overhead."""
    return state_bytes(model, method.returned_names(model))


def state_bytes(model: nn.Module, names: Collection[str]) -> int:
    """Bytes of these tensors of a model's state."""
    state = model.state_dict()
    return sum(state[name].numel() * state[name].element_size() for name in names)


def bytes_per_image(method: Method, model: nn.Module) -> int:
    """Bytes that a site of a split method sends for one training image in one epoch; 0 for the others."""
    forms = [form for parcel in method.parcels(model) for form in parcel.values()]
    return sum(math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in forms)


def amount(size: float) -> str:
    """Bytes in words: "nothing", "312 bytes", "1.4 KiB", "42.7 MiB"."""
    if size >= 0.05 * 2**20:
        return f"{size / 2**20:.1f} MiB"
    if size >= 2**10:
        return f"{size / 2**10:.1f} KiB"
    return f"{size} bytes" if size else "nothing"


def traffic(method: Method, model: nn.Module) -> str:
    """In words, what one site sends: "42.7 MiB" or "32 bytes" per round, "0.38 MiB per image and epoch", "nothing"."""
    image, round_ = bytes_per_image(method, model), bytes_per_round(method, model)
    if image:
        return f"{image / 2**20:.2f} MiB per image and epoch"
    return amount(round_)
