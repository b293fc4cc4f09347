"""The allow-list: the one place that decides what may leave a site.

Three things may: the shared tensors of the method (exact name, shape and type), finite scalars with those names of
`METRICS` that the method and its task report (`WirePolicy.scalars`), and the fields of the check-in, each in a format
so tight that no path, patient id or text fits through. Images, predictions and ids have no way out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np

from heterosync.errors import UserError
from heterosync.methods import get_method
from heterosync.methods.leaves import SCALAR_LEAVES
from heterosync.training import CLASSIFICATION, SEGMENTATION

#: Diagnostics of methods that may have an anchor task (models/mechanism.py).
COUPLING = frozenset(
    {"primary_gradient", "anchor_gradient", "anchor_gradient_ratio", "partner_effect", "mixture_share"}
)
#: Scalars (privacy class W0) that a site may report, by name.
METRICS: frozenset[str] = COUPLING | frozenset(
    {
        # local training
        "val_auc_received",
        "val_auc_best",
        "val_dice_received",
        "val_dice_best",
        "best_epoch",
        "train_loss",
        "n_train",
        "n_validation",
        "steps",
        "seconds",
        # of single methods (`Method.scalars`); label_entropy and label_balance are of class W2
        "label_entropy",
        "label_balance",
        "n_epochs",
        "train_accuracy",
        "val_accuracy",
        # evaluation of volumes
        "dice",
        "dice_sd",
        "hd95",
        "volume_error",
        "n_missed",
        # evaluation
        "auc",
        "accuracy",
        "recall",
        "precision",
        "n",
        "n_positive",
        "ci_low",
        "ci_high",
    }
)

MAX_LABEL = 40
_SITE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?=[A-Za-z0-9])){0,62}")
_METHOD = re.compile(r"[a-z][a-z0-9_]{0,39}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_WEIGHTS = re.compile(r"none|imagenet|stand-in|file sha256:[0-9a-f]{64}")
_LABEL = re.compile(rf"[^\W_][\w +()-]{{0,{MAX_LABEL - 1}}}")
_VERSION = re.compile(
    r"[0-9]{1,4}(\.[0-9]{1,4}){0,3}([a-z]{1,4}[0-9]{0,4})?(\.(post|dev)[0-9]{1,8})?(\+[a-z0-9.]{1,20})?"
)
_PACKAGES = frozenset({"heterosync", "torch", "torchvision", "monai", "nvflare", "python"})
_COUNTS = frozenset({"train", "validation", "test"})


class Blocked(UserError):
    """Something not on the allow-list was about to leave the site."""


def _text(pattern: re.Pattern[str]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and pattern.fullmatch(value) is not None


def _is_label(value: Any) -> bool:
    # Four digits in a row are more likely a date or a patient number than the name of a class.
    return isinstance(value, str) and _LABEL.fullmatch(value) is not None and not re.search(r"\d{4}", value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9


#: Fields of the check-in and the form that each must have.
CHECK_IN: dict[str, Callable[[Any], bool]] = {
    "site": _text(_SITE),
    "method": _text(_METHOD),
    "anchor_digest": lambda value: value is None or _text(_DIGEST)(value),
    "labels": lambda value: isinstance(value, list) and len(value) == 2 and all(map(_is_label, value)),
    "model_hash": _text(_DIGEST),
    "initial_weights": lambda value: value is None or _text(_WEIGHTS)(value),
    "precision": lambda value: value in ("float32", "bfloat16"),
    "versions": lambda value: (
        isinstance(value, dict) and set(value) <= _PACKAGES and all(map(_text(_VERSION), value.values()))
    ),
    "counts": lambda value: isinstance(value, dict) and set(value) <= _COUNTS and all(map(_is_count, value.values())),
}


def is_site_name(name: Any) -> bool:
    """Whether `name` may stand for a site in reports and file names: letters, digits, dots, dashes, underscores."""
    return CHECK_IN["site"](name)


def _finite_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, (bool, np.bool_)) and math.isfinite(value)


def reportable(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The part of `metrics` that may leave; other names and undefined values (None, NaN: an AUC of one class) stay."""
    kept = {name: value for name, value in metrics.items() if name in METRICS and _finite_number(value)}
    return {name: int(value) if isinstance(value, (int, np.integer)) else float(value) for name, value in kept.items()}


def signature(value: Any) -> tuple[tuple[int, ...], str]:
    """(shape, type name) of a torch tensor, a numpy array or scalar, or of a pair that is one already."""
    if isinstance(value, tuple):
        shape, dtype = value
    else:
        shape, dtype = value.shape, value.dtype
    return tuple(int(n) for n in shape), str(dtype).removeprefix("torch.")


class WirePolicy:
    """What a site may send for one method.

    `reference` maps the names of the shared tensors to tensors or to (shape, type) pairs; it is empty for methods whose
    weights stay at home. `parcels`: what a method whose network is cut sends in every step (`Method.parcels`), for at
    most `batch` images. A check raises `Blocked` with the name of the first thing that has no permission to leave.
    """

    def __init__(self, method: str, reference: Mapping[str, Any], parcels: Sequence[Mapping] = (), batch: int = 0):
        self.method, self.parcels, self.batch = method, tuple(parcels), batch
        self.reference = {name: signature(value) for name, value in reference.items()}

    @cached_property
    def scalars(self) -> frozenset[str]:
        """Names of the scalars that sites report under the method: those of its task, the coupling of two tasks only
        where there may be two, and its own."""
        method = get_method(self.method)
        others = (CLASSIFICATION.scalars | SEGMENTATION.scalars) - method.task.scalars
        coupling = frozenset[str]() if method.couples else COUPLING
        return METRICS - others - coupling - SCALAR_LEAVES.keys() | set(method.scalars)

    def check(self, tensors: Mapping[str, Any], metrics: Mapping[str, Any] | None = None) -> None:
        """A message of a training or validation: tensors by exact name, shape and type; scalars by name, finite."""
        for name, value in tensors.items():
            expected = self.reference.get(name)
            if expected is None:
                raise self._blocked(f"tensor '{str(name)[:80]}' is not one of the {len(self.reference)} shared tensors")
            if not (hasattr(value, "shape") and hasattr(value, "dtype")):
                raise self._blocked(f"'{name}' is a {type(value).__name__}, not a tensor")
            if signature(value) != expected:
                raise self._blocked(f"tensor '{name}' has shape and type {signature(value)}, not {expected}")
        for name, value in (metrics or {}).items():
            if name not in METRICS:
                raise self._blocked(f"metric '{str(name)[:80]}' is not on the list of scalars that may leave")
            if name not in self.scalars:
                raise self._blocked(f"metric '{name}' is not one that this method reports")
            if not _finite_number(value):
                raise self._blocked(f"metric '{name}' is not a finite number")

    def check_step(self, tensors: Mapping[str, Any]) -> None:
        """A message of a step: exactly the tensors of one of the method's, with one part per image of the batch."""
        form = next((form for form in self.parcels if set(form) == set(tensors)), None)
        if form is None:
            what = ", ".join(f"'{str(name)[:40]}'" for name in sorted(map(str, tensors))) or "nothing"
            raise self._blocked(f"a step's message with {what} is not one that the method sends")
        for name, (shape, dtype) in form.items():
            value = tensors[name]
            if not (hasattr(value, "shape") and hasattr(value, "dtype")):
                raise self._blocked(f"'{name}' is a {type(value).__name__}, not a tensor")
            found, kind = signature(value)
            if kind != dtype or found[1:] != tuple(shape) or not found or not 1 <= found[0] <= self.batch + 1:
                largest = f"up to {self.batch + 1} of {tuple(shape)}"  # a last image alone joins the batch before it
                raise self._blocked(f"tensor '{name}' has shape and type {(found, kind)}, not {largest}, {dtype}")

    def check_report(self, report: Mapping[str, Any]) -> None:
        """The message of a check-in: only the fields of `CHECK_IN`, each in its form. Values are never quoted."""
        for name, value in report.items():
            form = CHECK_IN.get(name)
            if form is None:
                raise self._blocked(f"check-in field '{str(name)[:80]}' is not on the list")
            if not form(value):
                hint = f": two names of at most {MAX_LABEL} letters, in site.yaml" if name == "labels" else ""
                raise self._blocked(f"check-in field '{name}' does not have its agreed form{hint}")

    def _blocked(self, reason: str) -> Blocked:
        return Blocked(f"method {self.method}: blocked from leaving the site: {reason}")


def audit_lines(tensors: Mapping[str, Any], scalars: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """One record {name, shape, dtype, bytes} for everything in a message, tensors first; never a value."""
    lines = []
    for name, value in tensors.items():
        shape, dtype = signature(value)
        size = math.prod(shape) * int(getattr(value.dtype, "itemsize", 4))
        lines.append({"name": name, "shape": list(shape), "dtype": dtype, "bytes": size})
    for name, value in (scalars or {}).items():
        lines.append({"name": name, "shape": [], "dtype": type(value).__name__, "bytes": len(repr(value))})
    return lines


def payload_bytes(tensors: Mapping[str, Any]) -> int:
    """Bytes of the tensors of one message."""
    return sum(line["bytes"] for line in audit_lines(tensors))
