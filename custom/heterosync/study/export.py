"""A trained model as one file that runs without heterosync: a `torch.export` program from images to probabilities."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from heterosync.errors import UserError
from heterosync.federation.modelfile import ModelFile, load_model
from heterosync.files import write_with
from heterosync.methods.base import Method
from heterosync.study.partners import partner_images
from heterosync.training import CLASSIFICATION

#: Largest difference between the program read back and the model that is taken as equal (float32 rounding).
TOLERANCE = 1e-5


class Scorer(nn.Module):
    """Images float32 (b, c, h, w) in [0, 1] to probabilities (b,) of the positive class; partners are part of the
    program."""

    def __init__(self, method: Method, network: nn.Module, partners: Tensor | None):
        super().__init__()
        self.network = network
        self._predict = method.predict
        self.register_buffer("partners", partners)

    def forward(self, images: Tensor) -> Tensor:
        if self.partners is None:
            return self._predict(self.network, images, "self")
        scores = [self._predict(self.network, images, p.expand_as(images)) for p in self.partners.unsqueeze(1)]
        return torch.stack(scores).mean(0)


def export_model(model: Path | str | ModelFile, out: Path | str, partner: str | None = None) -> dict[str, object]:
    """Write `out` (.pt2), read it back, and compare it with the model on seeded random images in batches of 1 and 3.

    Returns what a user of the file must know. Raises `UserError` when the program does not give the model's scores;
    nothing is left behind then. `partner`: "self" or "sat_mean" (`sat_index` has no fixed partner to build in).
    """
    file = model if isinstance(model, ModelFile) else load_model(model)
    method, network = file.build()
    if method.task is not CLASSIFICATION:
        raise UserError(f"a model of method '{method.name}' segments volumes: only pictures' models are exported")
    partner = partner or str(getattr(method.settings, "test_partner", "self"))
    if partner == "sat_index":
        raise UserError(
            "--partner sat_index cannot be exported: its partner depends on the image; use self or sat_mean"
        )
    scorer = Scorer(method, network, partner_images(method, file.assets, partner)).eval()
    size, channels = method.training.image_size, method.training.channels
    images = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scorer(images[:1])  # what a method reads only when it is needed is there before the program is traced
    program = torch.export.export(scorer, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))

    with torch.inference_mode():
        kind = str(scorer(images).dtype).removeprefix("torch.")
    difference = 0.0

    def write_and_compare(path: Path) -> None:
        nonlocal difference
        torch.export.save(program, path)
        again = torch.export.load(path).module()
        with torch.inference_mode():
            difference = max(float((again(part) - scorer(part)).abs().max()) for part in (images, images[:1]))
        if not difference <= TOLERANCE:
            raise UserError(f"the exported program differs from the model by {difference:.1e}: it was not written")

    path = write_with(out, write_and_compare)
    return {
        "file": str(path),
        "method": file.method,
        "input": f"float32 (batch, {channels}, {size}, {size}), values 0 to 1",
        "output": f"{kind} (batch,), probability of '{file.labels[-1] if file.labels else 1}'",
        "partner": partner if method.uses_anchor else "none",
        "largest_difference": difference,
        "read_with": "torch.export.load(file).module()",
    }
