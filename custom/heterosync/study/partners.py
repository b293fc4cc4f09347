"""The second image of the two-task network when it predicts (docs/hsl.md), and its place in a model file.

A server has no anchor pack, so the model file of a run carries no partner images until somebody who has the pack puts
them in.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from heterosync.data.anchor import load_anchor
from heterosync.errors import UserError, nearest
from heterosync.federation.modelfile import load_model, save_model
from heterosync.methods.base import Method
from heterosync.training.seeds import stream

PARTNERS = ("self", "sat_index", "sat_mean")
ASSET = "partners"  # uint8 (n, c, h, w)


def choose_partners(method: Method, anchor: Path | str) -> Tensor:
    """The first `n_partners` images of the shuffled anchor list, uint8 (n, c, h, w): those that sites use for
    `sat_mean`.

    `anchor` is an anchor pack or a site folder that holds one. Raises `UserError`.
    """
    folder = Path(anchor)
    folder = folder / "anchor" if (folder / "anchor").is_dir() else folder
    training = method.training
    pack = load_anchor(folder, training.image_size, training.channels, fit=training.fit)
    rows = stream(method.training.seed, "test partner").permutation(len(pack))
    return torch.from_numpy(pack.subset(rows[: getattr(method.settings, "n_partners", 16)]).pixels)


def partner_images(
    method: Method, assets: dict[str, Tensor], partner: str, anchor: Path | str | None = None
) -> Tensor | None:
    """The partners as float32 (n, c, h, w) in [0, 1], out of a model file's assets or of `anchor`; None for "self"."""
    if partner not in PARTNERS:
        raise UserError(f"--partner {partner}: {nearest(partner, PARTNERS)}")
    if partner == "self" or not method.uses_anchor:
        return None
    if ASSET in assets:
        return assets[ASSET].float() / 255
    if anchor is None:
        raise UserError(
            f"--partner {partner}: the model file carries no partner images; use self, or put them in with "
            "`heterosync partners MODEL --anchor SITE_FOLDER`"
        )
    return choose_partners(method, anchor).float() / 255


def embed_partners(model: Path | str, anchor: Path | str, out: Path | str | None = None) -> int:
    """Write the model file again (in place, or to `out`) with partner images inside; returns how many.

    Raises `UserError` for a model of a method that looks at one image only.
    """
    file = load_model(model)
    method, _ = file.build()
    if not method.uses_anchor:
        raise UserError(f"model file {model}: method '{file.method}' looks at one image and needs no partner")
    chosen = choose_partners(method, anchor)
    assets = {**file.assets, ASSET: chosen}
    save_model(
        out or model,
        file.method,
        file.method_settings,
        file.training,
        file.state,
        file.labels,
        file.round,
        assets,
        file.versions,
    )
    return len(chosen)
