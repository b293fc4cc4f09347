"""Settings as frozen dataclasses that check themselves; the settings of local training.

Every field is made by `setting`, which keeps beside the default where it comes from and what is allowed. Marks of the
sources: [P] the HSL paper, [M] the method's own paper, [C] official code, [R] reconstruction, [own] a choice of this
project.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

from heterosync.errors import UserError, nearest

T = TypeVar("T", bound="Settings")
L = TypeVar("L", bound="LoopSettings")

#: Values of `weights` that name no file.
WEIGHTS = ("auto", "imagenet", "none")


def setting(
    default: Any,
    source: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """A dataclass field with the source of its default and its allowed range (inclusive) or choices."""
    return field(default=default, metadata={"source": source, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """Base of all settings: types and ranges are checked on making one. Raises `UserError` that names the setting."""

    what: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            name = f"{self.what} setting '{item.name}'".strip()
            value = _typed(getattr(self, item.name), hints[item.name], name, item.default)
            _check_range(value, item.metadata, name)
            object.__setattr__(self, item.name, value)
        idle = self.idle()
        for item in fields(self):
            if item.name in idle and getattr(self, item.name) != item.default:
                raise UserError(
                    f"{self.what} setting '{item.name}' counts only with {idle[item.name]}: set that too or leave it"
                )

    def idle(self) -> dict[str, str]:
        """Settings that have no effect beside the values of the others: name -> the condition under which they count.
        They are refused when changed."""
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values (tuples become lists), fit for JSON and for `settings_from`."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def settings_from(cls: type[T], values: Mapping[str, Any] | None) -> T:
    """Make settings from a mapping, e.g. a job's configuration. Raises `UserError` for an unknown name or bad value."""
    values = dict(values or {})
    known = [item.name for item in fields(cls)]
    for name in values:
        if name not in known:
            label = f"{cls.what} setting '{name}'".strip()
            raise UserError(
                f"{label} is unknown: {nearest(str(name), known)}" if known else f"{label} is unknown: none exist"
            )
    return cls(**values)


def _typed(value: Any, hint: Any, name: str, default: Any = None) -> Any:
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, (list, tuple)) or len(value) != len(kinds):
            raise UserError(f"{name} is {value!r}: it must be a list of {len(kinds)} values, as {list(default)}")
        return tuple(_typed(part, kind, name) for part, kind in zip(value, kinds, strict=True))
    if hint is float:
        if isinstance(value, str):  # YAML reads 1e-3 as text
            try:
                value = float(value)
            except ValueError:
                pass
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        raise UserError(f"{name} is {value!r}: it must be a finite number")
    if hint is int and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{name} is {value!r}: it must be a whole number")
    if hint is bool and not isinstance(value, bool):
        raise UserError(f"{name} is {value!r}: it must be true or false")
    if hint is str and not isinstance(value, str):
        raise UserError(f"{name} is {value!r}: it must be text")
    return value


def _check_range(value: Any, metadata: Mapping[str, Any], name: str) -> None:
    choices, low, high = (metadata.get(key) for key in ("choices", "low", "high"))
    if choices and value not in choices:
        raise UserError(f"{name} is '{value}': {nearest(str(value), choices)}")
    for part in value if isinstance(value, tuple) else (value,):
        if low is not None and part < low:
            raise UserError(f"{name} is {part}: the smallest possible value is {low}")
        if high is not None and part > high:
            raise UserError(f"{name} is {part}: the largest possible value is {high}")


@dataclass(frozen=True)
class LoopSettings(Settings):
    """What the local loop itself asks for, whatever is learned; each task adds its own and has its own defaults."""

    what: ClassVar[str] = "training"

    rounds: int = setting(20, "[P] 100 epochs, fusion every 5", low=1)
    local_epochs: int = setting(5, "[P]", low=1)
    batch_size: int = setting(64, "[own]; paper: by local capacity, code: 200 and 100", low=2)
    optimizer: str = setting("adam", "[P]; the code uses AdamW [C]", choices=("adam", "adamw", "sgd"))
    lr: float = setting(1e-3, "[P]", low=1e-12)
    weight_decay: float = setting(1e-4, "[P]", low=0.0)
    schedule: str = setting("constant", "[own]", choices=("constant",))
    lr_floor: float = setting(1e-4, "[C]", low=0.0)
    keep_moments: bool = setting(
        False, "[R] optimiser moments start anew after a fusion; kept are those of the best epoch, as its weights"
    )
    augment: bool = setting(True, "[C] rotation +-15 degrees, horizontal flip")
    early_stop: bool = setting(False, "[R] stop where the plateau rule fires")
    plateau_gain: float = setting(0.005, "[P] 0.5 % AUC", low=0.0)
    plateau_count: int = setting(3, "[P]", low=1)
    patience: int = setting(5, "[P] local epochs without validation gain before a round ends early", low=1)
    precision: str = setting("auto", "[own] measured once per site", choices=("auto", "float32", "bfloat16"))
    seed: int = setting(0, "[own]", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.schedule != "constant" and self.lr_floor > self.lr:
            raise UserError(
                f"training setting 'lr_floor' is {self.lr_floor}, above 'lr' {self.lr}: lower it, e.g. to 0"
            )

    @property
    def weights_path(self) -> bool:
        """Whether the setting `weights` of tasks that have one says where a file lies, not only its name."""
        return os.path.dirname(getattr(self, "weights", "")) != ""

    @classmethod
    def from_dict(cls: type[L], values: Mapping[str, Any] | None) -> L:
        return settings_from(cls, values)


@dataclass(frozen=True)
class TrainingSettings(LoopSettings):
    """The local recipe that all methods of classification share (paper, Model development; docs/hsl.md)."""

    image_size: int = setting(224, "[P] 224; pixels per side, aspect ratio not kept [C]", low=16, high=2048)
    channels: int = setting(3, "[C] RGB; 1 = grey [own]", low=1, high=3)
    fit: str = setting(
        "stretch", "[C] to a square; crop: the shorter side, then the middle [own]", choices=("stretch", "crop")
    )
    backbone: str = setting(
        "resnet18", "[P]; resnet_tiny for the smoke profile [own]", choices=("resnet18", "resnet_tiny")
    )
    weights: str = setting(
        "auto", "[C] ImageNet; auto, none, imagenet, a file's name in torch's cache, in simulations its path [own]"
    )
    schedule: str = setting(
        "cosine", "[P] cosine 'period 10', [C] T_max 10", choices=("cosine", "warm_restart", "constant")
    )
    schedule_period: int = setting(10, "[P] epochs, counted over all rounds [R]", low=1)
    balanced_sampler: bool = setting(True, "[C]+[R] the same sampler for every method, or results compare samplers")
    match_steps: int = setting(0, "[R] items per epoch at least, for as many steps as HSL; 0 = off", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels == 2:
            raise UserError("training setting 'channels' is 2: 1 (grey) or 3 (RGB) are possible")
        file = self.weights_path or os.path.splitext(self.weights)[1]  # it may exist at the sites only
        if self.weights not in WEIGHTS and not file:
            raise UserError(
                f"training setting 'weights' is '{self.weights}': {nearest(self.weights, WEIGHTS)}, or the name of a "
                "file in torch's cache, for example resnet18-own.pt"
            )
