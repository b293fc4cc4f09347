"""What can be done with trained models, by what they learned: the one place that `predict` and `export` ask.

Keyword arguments of the functions are the options of the commands; what a function does not take is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heterosync.errors import UserError
from heterosync.federation.modelfile import ModelFile, load_model
from heterosync.methods import get_method
from heterosync.study.bundle import export_bundle
from heterosync.study.export import export_model
from heterosync.study.predict import predict
from heterosync.study.segment import predict_volumes
from heterosync.study.table import number, with_interval
from heterosync.training import CLASSIFICATION, SEGMENTATION, Task

Say = Callable[[str], None]
_CAVEAT = "not a test where the model was trained on some of them"


@dataclass(frozen=True)
class Use:
    """predict(files, source, out, say, **options) and export(files, out, **options), which return what a program may
    read; `say` gets the lines for people."""

    predict: Callable[..., dict[str, object]]
    export: Callable[..., dict[str, object]]


def _score_pictures(
    files: Sequence[ModelFile],
    source: Path,
    out: Path,
    say: Say,
    partner: str | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    anchor: Path | None = None,
) -> dict[str, object]:
    found = predict(_only(files), source, partner, batch_size, device, anchor)
    found.to_csv(out)
    say(f"wrote {out}: {len(found.names)} images")
    if found.metrics:
        auc = with_interval(*(found.metrics[key] for key in ("auc", "ci_low", "ci_high")))
        say(f"AUC over every row of the manifest: {auc} ({_CAVEAT})")
    return {"file": str(out), "images": len(found.names), "metrics": found.metrics}


def _segment_volumes(
    files: Sequence[ModelFile], source: Path, out: Path, say: Say, device: str = "cpu", probability: bool = False
) -> dict[str, object]:
    found = predict_volumes(files, source, out, device, probability, say)
    for path in found.files:
        say(f"wrote {path}")
    if found.metrics:
        dice = with_interval(*(found.metrics[key] for key in ("dice", "ci_low", "ci_high")))
        distance = number(found.metrics["hd95"], 1)
        say(f"mean Dice over all cases: {dice}, 95 % Hausdorff distance {distance} mm ({_CAVEAT})")
    volumes = {case.scan.image.name: round(case.volume, 3) for case in found.cases}
    return {"files": [str(path) for path in found.files], "volumes_ml": volumes, "metrics": found.metrics}


def _export_program(files: Sequence[ModelFile], out: Path, partner: str | None = None) -> dict[str, object]:
    return export_model(_only(files), out, partner)


USES: dict[Task, Use] = {
    CLASSIFICATION: Use(_score_pictures, _export_program),
    SEGMENTATION: Use(_segment_volumes, export_bundle),
}


def use_models(act: str, models: Sequence[Path | str], *arguments: Any, **options: Any) -> dict[str, object]:
    """`act` ("predict" or "export") with model files, as their task has it. Options that are None were not given.

    Raises `UserError` for models of several tasks and for an option that is not theirs.
    """
    files = [load_model(path) for path in models]
    methods = [get_method(file.method) for file in files]
    task = methods[0].task
    for file, method in zip(files, methods, strict=True):
        if method.task is not task:
            raise UserError(f"model file {file.path} is for {method.task.name}, {files[0].path} for {task.name}")
    work = getattr(USES[task], act)
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in inspect.signature(work).parameters:
            shown = name.replace("_", "-")
            raise UserError(f"--{shown} is not for models of {task.name} ('{methods[0].name}'): leave it out")
    result: dict[str, object] = work(files, *arguments, **given)
    return result


def _only(files: Sequence[ModelFile]) -> ModelFile:
    if len(files) > 1:
        raise UserError(f"pictures are scored by one model, not by {len(files)}: name one")
    return files[0]
