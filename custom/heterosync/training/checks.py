"""What must hold before a site trains: data, device and received tensors fit the method. All raise `UserError`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from heterosync.errors import SiteError, nearest
from heterosync.training.precision import PRECISIONS
from heterosync.training.task import LocalData

#: A mean over fewer scores is hardly one.
FEW = 3


def check_machine(site: str, device: torch.device, precision: str) -> None:
    """The device is there, the precision is known."""
    check_device(site, device)
    if precision not in PRECISIONS:
        raise SiteError(f"site {site}: precision '{precision}': {nearest(precision, PRECISIONS)}")


def check_device(site: str, device: torch.device) -> None:
    """This machine has the device."""
    problem = device_problem(str(device))
    if problem:
        raise SiteError(f"site {site}: {problem}")


def device_problem(name: str) -> str | None:
    """One line when this machine lacks the device of that name, as site.yaml writes it (`auto` is always there)."""
    here, device = True, torch.device("cpu" if name == "auto" else name)
    if device.type == "cuda":
        here = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    elif device.type == "mps":
        here = torch.backends.mps.is_available() and not device.index
    return None if here else f"device '{name}' is not there: set device in site.yaml to cpu or auto"


def check_trainable(site: str, data: LocalData, items: str, least: int) -> None:
    """There is something to train on; a site that only evaluates needs no training rows."""
    if len(data.splits["train"]) < least:
        raise SiteError(f"site {site}: the train split has fewer than {least} {items}: add rows to manifest.csv")


def few_scored(site: str, data: LocalData, items: str) -> list[str]:
    """A warning for each split whose mean score, which leaves the site, tells of single patients."""
    counts = {split: len(data.splits.get(split, ())) for split in ("validation", "test")}
    return [
        f"site {site}: {split} has {count} {items if count > 1 else items.removesuffix('s')}: "
        f"its score, which leaves the site, is that of single patients: use {FEW} or more"
        for split, count in counts.items()
        if 0 < count < FEW
    ]


def split_rows(site: str, data: LocalData, split: str) -> np.ndarray:
    """Row numbers of a split."""
    if split not in data.splits:
        raise SiteError(f"site {site}: there is no split '{split}': {nearest(split, data.splits)}")
    return data.splits[split]


def check_shared(shared: Mapping[str, Tensor], names: Collection[str], own: Mapping[str, Tensor], where: str) -> None:
    """Refuse received tensors that are not exactly `names`, in the shapes of `own`, all finite. Raises `SiteError`."""
    missing = sorted(set(names) - set(shared))
    if missing:
        raise SiteError(f"{where} lacks the tensor '{missing[0]}' ({len(missing)} in all): is it of the same method?")
    extra = sorted(set(shared) - set(names))
    if extra:
        raise SiteError(f"{where} has the unknown tensor '{extra[0]}' ({len(extra)} in all): is it of the same method?")
    for name, value in shared.items():
        if value.shape != own[name].shape:
            found, wanted = tuple(value.shape), tuple(own[name].shape)
            raise SiteError(
                f"{where}: tensor '{name}' is {found} instead of {wanted}: settings differ from the server's"
            )
        if not torch.isfinite(value).all():
            raise SiteError(f"{where}: tensor '{name}' holds values that are not finite")
