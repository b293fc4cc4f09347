"""Fusion of the sites' weights: a mean over every tensor, the same to the last bit in whatever order the sites answer.

Paper equation 1: w <- (1/K) sum_k w_k, with equal weights whatever the size of a site, over every tensor of the state
including BatchNorm statistics and integer counters. Variants: sample weights (FedAvg), and weights by a validation
score: of what a site sends (Sarma et al., JAMIA 2021, Training strategy), or of what it received.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from heterosync.errors import ContributionRefused, HeteroSyncError
from heterosync.federation.contribution import Contribution
from heterosync.federation.tensorfile import TensorFile, as_array
from heterosync.federation.wire import signature
from heterosync.files import make_folder
from heterosync.methods.answer import Answer

#: Weighting -> which of a round's two validation scores it goes by.
SCORED = {"metric": "best", "quality": "received"}
WEIGHTINGS = ("equal", "samples", *SCORED, "none")
_BLOCK = 1 << 16  # elements summed at a time: half a megabyte of float64 stays in the cache of the processor


class Fusion:
    """Collects the contributions of one round and means them.

    reference: name -> tensor, numpy array or (shape, type) pair; every contribution must have exactly these.
    weighting: "equal" (paper equation 1), "samples" (n_k / n), "metric" and "quality" (s_k / s, where s_k is the scalar
    `metric`, 0 to 1, that site k reports; equal where all of them are 0), "none" (contributions carry metrics only).
    needed: scalars without which a contribution does not count.
    spill: a folder; contributions then wait on disk, so that memory does not grow with the number of sites. The files
    are written over in the next round and deleted with this object.

    Contributions are summed in float64 in the order of site names; integer tensors are rounded to the nearest integer.
    """

    def __init__(
        self,
        reference: Mapping[str, Any],
        weighting: str,
        method: str,
        spill: Path | None = None,
        metric: str = "",
        needed: Collection[str] = (),
    ):
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting '{weighting}' is not one of {WEIGHTINGS}")
        self.reference = {name: signature(value) for name, value in reference.items()}
        self.weighting, self.method, self._metric, self._needed = weighting, method, metric, needed
        self.refused: dict[str, str] = {}
        self._spill = make_folder(spill) if spill is not None else None
        if spill is not None:
            _empty(spill)  # of what a killed run left
            weakref.finalize(self, _empty, spill)
        self._lock = threading.Lock()  # answers may come in on several threads
        self._round = -1
        self._weights: dict[str, float] = {}  # of the sites accepted in this round
        self._reports: dict[str, tuple[int, dict[str, float]]] = {}  # the same: training images, scalars
        self._held: dict[str, _Kept | TensorFile] = {}
        self._wrap: Callable[[str, np.ndarray], Any] = _container({})

    def start(self, round_: int) -> None:
        """Begin a round: forget what came before."""
        with self._lock:
            self._held = {}
            self._round = round_
            self._weights, self._reports = {}, {}
            self.refused = {}

    @property
    def contributors(self) -> list[str]:
        """Sites accepted in this round, in name order."""
        return sorted(self._weights)

    def accept(self, contribution: Contribution) -> None:
        """Take a contribution in whole, or take nothing of it and raise `ContributionRefused` with site and reason."""
        site = contribution.site
        with self._lock:
            try:
                arrays = self._checked(contribution)
            except ContributionRefused as refusal:
                self.refused[site] = refusal.reason
                raise
            if not self._held:
                self._wrap = _container(contribution.tensors)
            if self._spill is None:
                self._held[site] = _Kept(arrays)
            else:
                self._held[site] = TensorFile(self._spill / f"{len(self._held)}.contribution").write(arrays)
            self._weights[site] = self._weight(contribution)
            self._reports[site] = int(contribution.samples), dict(contribution.metrics)

    def result(self) -> dict[str, Any]:
        """The fused state, in the containers that came in (torch or numpy). The contributions are dropped."""
        with self._lock:
            weights = self._shares()
            parts = [self._held[site] for site in weights]
            fused = {
                name: self._wrap(name, _mean(parts, [*weights.values()], name, shape, dtype))
                for name, (shape, dtype) in self.reference.items()
            }
            self._held = {}
            return fused

    def answers(self) -> dict[str, Answer]:
        """Each site's contribution, in name order, for a method that does not take the mean; read while it waits here,
        which is until `drop`."""
        with self._lock:
            shares = self._shares()
            total, names = sum(shares.values()), tuple(self.reference)
            return {
                site: Answer(*self._reports[site], share / total, share, names, partial(self._read, self._held[site]))
                for site, share in shares.items()
            }

    def drop(self) -> None:
        """Let the contributions of the round go."""
        with self._lock:
            self._held = {}

    def close(self) -> None:
        """Delete the files of the contributions; happens by itself when the object goes."""
        self._held = {}
        if self._spill is not None:
            _empty(self._spill)

    def _shares(self) -> dict[str, float]:
        """Weights of the sites that contributed, in name order, not divided by their sum."""
        if not self._held:
            raise HeteroSyncError(f"round {self._round}: no contribution to fuse")
        weights = {site: self._weights[site] for site in sorted(self._held)}
        return weights if any(weights.values()) else dict.fromkeys(weights, 1.0)

    def _read(self, held: _Kept | TensorFile, name: str) -> torch.Tensor:
        shape, _ = self.reference[name]
        return torch.from_numpy(np.array(held.part(name, 0, math.prod(shape))).reshape(shape))

    def _weight(self, contribution: Contribution) -> float:
        if self.weighting == "samples":
            return float(int(contribution.samples))
        return float(contribution.metrics[self._metric]) if self.weighting in SCORED else 1.0

    def _checked(self, contribution: Contribution) -> dict[str, np.ndarray]:
        def refuse(reason: str) -> ContributionRefused:
            return ContributionRefused(contribution.site, reason)

        if contribution.method != self.method:
            raise refuse(f"it is of method '{contribution.method}', this run trains '{self.method}'")
        if contribution.round != self._round:
            raise refuse(f"it is of round {contribution.round}, this is round {self._round}")
        if contribution.site in self._weights:
            raise refuse("the site has contributed to this round already")
        if self.weighting == "samples" and not contribution.samples > 0:
            raise refuse(f"it reports {contribution.samples} training images, at least 1 is needed")
        score = contribution.metrics.get(self._metric) if self.weighting in SCORED else 0.0
        if score is None:
            raise refuse(f"it reports no {self._metric}, by which sites are weighed here")
        if not 0 <= score <= 1:  # also false for NaN; a larger one would be a larger share of the mean than its due
            raise refuse(f"its {self._metric} is {score}, by which sites are weighed here: it must be from 0 to 1")
        for name in self._needed:
            if name not in contribution.metrics:
                raise refuse(f"it reports no {name}, which this method goes by")
        for name in self.reference:
            if name not in contribution.tensors:
                raise refuse(f"tensor '{name}' is missing")
        for name in contribution.tensors:
            if name not in self.reference:
                raise refuse(f"tensor '{name}' is not part of the shared state")
        arrays = {}
        for name, (shape, dtype) in self.reference.items():
            value = contribution.tensors[name]
            if not isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
                raise refuse(f"'{name}' is a {type(value).__name__}, not a tensor")
            got_shape, got_dtype = signature(value)
            if got_shape != shape:
                raise refuse(f"tensor '{name}' has shape {list(got_shape)}, not {list(shape)}")
            if got_dtype != dtype:
                raise refuse(f"tensor '{name}' has type {got_dtype}, not {dtype}")
            arrays[name] = as_array(value)
            if arrays[name].dtype.kind == "f" and not _finite(arrays[name]):
                raise refuse(f"tensor '{name}' holds values that are not finite")
        return arrays


class _Kept:
    """The tensors of one contribution in memory."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._flat = {name: np.ascontiguousarray(array).reshape(-1) for name, array in arrays.items()}

    def part(self, name: str, begin: int, count: int) -> np.ndarray:
        return self._flat[name][begin : begin + count]


def _empty(folder: Path) -> None:
    for file in folder.glob("*.contribution"):
        file.unlink()


def _finite(array: np.ndarray) -> bool:
    # One pass and no copy: a sum is finite only when all terms are; a rare overflow needs the second look.
    with np.errstate(all="ignore"):
        return bool(np.isfinite(array.sum(dtype=array.dtype)) or np.isfinite(array).all())


def _mean(parts: list[_Kept | TensorFile], weights: list[float], name: str, shape: tuple, dtype: str) -> np.ndarray:
    """sum(weight * tensor) / sum(weight) in float64, cast back to `dtype`; new memory of one tensor and some blocks."""
    out = np.empty(math.prod(shape), dtype)
    total = sum(weights)
    for begin in range(0, out.size, _BLOCK):
        count = min(_BLOCK, out.size - begin)
        mean = np.zeros(count)
        for part, weight in zip(parts, weights, strict=True):
            values = part.part(name, begin, count)
            mean += values if weight == 1.0 else np.multiply(values, weight, dtype=np.float64)
        mean /= total
        out[begin : begin + count] = mean if out.dtype.kind == "f" else np.rint(mean)
    return out.reshape(shape)


def _container(tensors: Mapping[str, Any]) -> Callable[[str, np.ndarray], Any]:
    """How results are handed back: as torch tensors, or as numpy arrays (and scalars where scalars came in)."""
    if any(isinstance(value, torch.Tensor) for value in tensors.values()):
        return lambda _, array: torch.from_numpy(array)
    scalars = {name for name, value in tensors.items() if isinstance(value, np.generic)}
    return lambda name, array: array[()] if name in scalars else array
