"""What must hold before a site trains: data, device and received tensors fit the method. All raise `UserError`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from heterosync.data.dataset import SiteData
from heterosync.errors import UserError, nearest
from heterosync.training.learner import Learner
from heterosync.training.precision import PRECISIONS


def check_fit(site: str, method: Learner, data: SiteData, device: torch.device, precision: str) -> None:
    """Pictures have the settings' size, the device is there, the precision is known."""
    check_device(site, device)
    settings = method.training
    if precision not in PRECISIONS:
        raise UserError(f"site {site}: precision '{precision}': {nearest(precision, PRECISIONS)}")
    wanted = (settings.channels, settings.image_size, settings.image_size)
    for name, images in (("images", data.primary), ("anchor images", data.anchor)):
        if images is not None and tuple(images.pixels.shape[1:]) != wanted:
            found = tuple(images.pixels.shape[1:])
            raise UserError(f"site {site}: {name} are {found}, training settings ask for {wanted}")


def check_device(site: str, device: torch.device) -> None:
    """This machine has the device."""
    problem = device_problem(str(device))
    if problem:
        raise UserError(f"site {site}: {problem}")


def device_problem(name: str) -> str | None:
    """One line when this machine lacks the device of that name, as site.yaml writes it (`auto` is always there)."""
    here, device = True, torch.device("cpu" if name == "auto" else name)
    if device.type == "cuda":
        here = torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
    elif device.type == "mps":
        here = torch.backends.mps.is_available() and not device.index
    return None if here else f"device '{name}' is not there: set device in site.yaml to cpu or auto"


def check_trainable(site: str, method: Learner, data: SiteData) -> None:
    """There is something to train on; a site that only evaluates needs neither training rows nor anchors."""
    if method.uses_anchor and (data.anchor is None or not len(data.anchor)):
        raise UserError(f"site {site}: method '{method.name}' needs the anchor pack: put it into anchor/")
    if len(data.splits["train"]) < 2:
        raise UserError(f"site {site}: the train split has fewer than 2 images: add rows to manifest.csv")


def check_shared(shared: Mapping[str, Tensor], names: Collection[str], own: Mapping[str, Tensor], where: str) -> None:
    """Refuse received tensors that are not exactly `names`, in the shapes of `own`, all finite. Raises `UserError`."""
    missing = sorted(set(names) - set(shared))
    if missing:
        raise UserError(f"{where} lacks the tensor '{missing[0]}' ({len(missing)} in all): is it of the same method?")
    extra = sorted(set(shared) - set(names))
    if extra:
        raise UserError(f"{where} has the unknown tensor '{extra[0]}' ({len(extra)} in all): is it of the same method?")
    for name, value in shared.items():
        if value.shape != own[name].shape:
            found, wanted = tuple(value.shape), tuple(own[name].shape)
            raise UserError(
                f"{where}: tensor '{name}' is {found} instead of {wanted}: settings differ from the server's"
            )
        if not torch.isfinite(value).all():
            raise UserError(f"{where}: tensor '{name}' holds values that are not finite")
