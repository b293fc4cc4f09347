"""Models of volumes whose probabilities may be averaged."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from heterosync.errors import UserError
from heterosync.federation.modelfile import ModelFile
from heterosync.methods.base import Method
from heterosync.training import SEGMENTATION
from heterosync.training.volume_settings import ALIKE


def build_alike(files: Sequence[ModelFile]) -> list[tuple[Method, nn.Module]]:
    """The method and the model of each file. Raises `UserError` for a model that does not segment volumes, or that was
    trained otherwise than the first (`ALIKE`)."""
    built = [file.build() for file in files]
    for file, (method, _) in zip(files, built, strict=True):
        if method.task is not SEGMENTATION:
            raise UserError(f"model file {file.path}: method '{method.name}' does not segment volumes: leave it out")
        for name in ALIKE:
            if getattr(method.training, name) != getattr(built[0][0].training, name):
                raise UserError(
                    f"model file {file.path} has another {name} than {files[0].path}: average models trained alike"
                )
    return built
