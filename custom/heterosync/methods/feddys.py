"""FedDyS: each epoch trains on the images that the model is least sure of, and balanced sites count more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from heterosync.methods.answer import Answer, mean
from heterosync.methods.base import COMMON_LEAVES, SCALAR_LEAVES, Method
from heterosync.methods.labels import equitability
from heterosync.training import Batch, Examples, Settings, setting


@dataclass(frozen=True)
class FedDySSettings(Settings):
    what: ClassVar[str] = "feddys"

    th_mode: str = setting(
        "mean",
        "[C] images up to the mean score, or up to its quantile `th`, are kept; none: all of them",
        choices=("mean", "percentage", "none"),
    )
    th: float = setting(0.15, "[C] runs with 0.01, 0.05 and 0.15", low=1e-6, high=1.0)
    weighting: str = setting(
        "label_balance", "[C] of the images kept last; samples: n_k / n", choices=("label_balance", "samples")
    )
    bn_buffers: str = setting(
        "equal",
        "[R] mean of BatchNorm's statistics, which the official framework leaves at the sites; weighted: as weights",
        choices=("equal", "weighted"),
    )

    def idle(self) -> dict[str, str]:
        return {} if self.th_mode == "percentage" else {"th": "th_mode=percentage"}


class FedDyS(Method):
    """Kiyamousavi, Kraychev, Koychev, "FedDyS: enhancing federated learning efficiency with dynamic sample selection",
    IEEE ISCC 2024; from its official code, since of the text only the abstract was at hand.

        site k, before each epoch, S from the epoch before (in the first all n_k images), p of the model as it is:
            margin_i = |p_i - (1 - p_i)|, half of it where label i has fewer of the n_k images than the mean class
            S <- {i in S: exp(margin_i) <= t},  t the mean of exp(margin) over S;  then one epoch of BCE on S
        server:  w <- w + sum_k (b_k / sum b) (w_k - w),   b_k = H(labels of the last S) / log 2;  equal if sum b = 0

    S only shrinks within a round; an epoch with fewer than two images ends it. BatchNorm statistics and counters: see
    `bn_buffers`. The sampler of all methods works on S as if the site had no other images. Native recipe: SGD 0.01
    without momentum, batches of 32, 5 epochs.
    Sent: as FedAvg, 42.7 MiB per round with ResNet18, and b_k, which tells the ratio of the labels of S.

    Degenerates: with `th_mode` none, `weighting` samples and `bn_buffers` weighted into FedAvg.
    """

    name = "feddys"
    title = "FedDyS"
    status = "code-faithful"
    citation = "Kiyamousavi et al., IEEE ISCC 2024; official code of May 2024"
    leaves = (
        "W1: all tensors of the classifier (weights, BatchNorm statistics and counters)",
        SCALAR_LEAVES["label_balance"],
        *COMMON_LEAVES,
    )
    scalars = ("label_balance",)
    weighting = "label_balance"
    Settings = FedDySSettings
    settings: FedDySSettings
    _rows: np.ndarray  # S, as positions of the training split
    _labels: np.ndarray  # of all training images

    def round_start(self, model: nn.Module, received: Mapping[str, Tensor], examples: Examples) -> None:
        self._rows = np.arange(examples.count)
        size = self.training.batch_size
        self._labels = np.concatenate([batch.labels.cpu().numpy() for batch in examples.training(size)])

    def batches(self, model: nn.Module, examples: Examples, round_: int, epoch: int) -> Iterator[Batch]:
        if self.settings.th_mode != "none":
            scores = sampling_scores(self._probabilities(model, examples), self._labels[self._rows], self._minority())
            quantile = self.settings.th if self.settings.th_mode == "percentage" else None
            self._rows = self._rows[kept(scores, quantile)]
        yield from (batch for batch in examples.chosen(round_, epoch, self._rows) if len(batch.labels) > 1)

    def diagnostics(self, model: nn.Module, examples: Examples) -> dict[str, float]:
        return {"label_balance": equitability(np.bincount(self._labels[self._rows].astype(int), minlength=2).tolist())}

    def fuse(
        self, sent: Mapping[str, Tensor], answers: Mapping[str, Answer], memory: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        weights = dict.fromkeys(answers, 1.0) if self.settings.bn_buffers == "equal" else None
        trained = {name for name, _ in self.build_model(weights="none").named_parameters()}
        return {name: mean(answers, name, None if name in trained else weights) for name in sent}

    def _minority(self) -> int | None:
        """The label with fewer images at the round's start than the mean class; None where both have as many."""
        positive = self._labels.mean()
        return None if positive == 0.5 else int(positive < 0.5)

    def _probabilities(self, model: nn.Module, examples: Examples) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            parts = [
                self.predict(model, batch.images, "self").double().cpu().numpy()
                for batch in examples.training(self.training.batch_size, self._rows)
            ]
        model.train()
        return np.concatenate(parts)


def sampling_scores(probabilities: np.ndarray, labels: np.ndarray, minority: int | None) -> np.ndarray:
    """exp(margin) of images with these probabilities (n,) of label 1; the margin is halved for label `minority`."""
    margin = np.abs(2 * probabilities - 1)
    return np.exp(np.where(labels == minority, margin / 2, margin))


def kept(scores: np.ndarray, quantile: float | None) -> np.ndarray:
    """Which images stay (n,): those up to the mean score, or up to a quantile of the scores. At least one does."""
    return scores <= (scores.mean() if quantile is None else np.quantile(scores, quantile))
