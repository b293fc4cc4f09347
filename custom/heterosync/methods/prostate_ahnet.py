"""Federated prostate segmentation, weighted by validation Dice (Sarma et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from heterosync.methods.base import VOLUME_LEAVES, Method
from heterosync.training import SEGMENTATION, Settings, setting


@dataclass(frozen=True)
class ProstateSettings(Settings):
    what: ClassVar[str] = "prostate_ahnet"

    weighting: str = setting(
        "metric",
        "[M] Dice of the model sent; samples: data quantity; quality: Dice of the model received [R]; equal",
        choices=("metric", "samples", "quality", "equal"),
    )


class ProstateAHNet(Method):
    """Sarma et al., "Federated learning improves site performance in multicenter deep learning without data sharing",
    JAMIA 28(6), 2021, Training strategy and federated model aggregation.

        site k:  w_k <- one epoch of soft Dice loss from w       server:  w <- sum_k (d_k / d) w_k
        d_k: mean Dice of w_k on site k's validation set, d = sum_k d_k; all 0: equal weights

    The Dice is that of the weights sent; with one local epoch, as in the paper, it is that of the most recent epoch.

    `weighting` holds what the paper's Discussion leaves to future work: data quantity, d_k = n_k; and data quality [R],
    d_k = mean Dice of w, the model received, on site k's validation set. That model is the same at every site, so that
    only images and masks can make the difference: masks that contradict those of the others weigh less. So do images
    that are merely unlike the others', and in round 0 it is the Dice of first values: a proxy, no measured quality.

    Sent: every tensor of the 3D AH-Net, BatchNorm statistics and counters included, and d_k. 145.8 MiB per round, in
    each direction.

    Degenerates: with `weighting` samples into FedAvg, with equal into a plain mean, as with any where all d_k are
    alike; with one site into `prostate_private`.
    """

    name = "prostate_ahnet"
    title = "Federated 3D AH-Net"
    status = "reconstruction"
    citation = "Sarma et al., JAMIA 28(6), 2021, doi 10.1093/jamia/ocaa341"
    leaves = ("W1: all tensors of the 3D AH-Net (weights, BatchNorm statistics and counters)", *VOLUME_LEAVES)
    task = SEGMENTATION
    weighting = "metric"
    Settings = ProstateSettings
