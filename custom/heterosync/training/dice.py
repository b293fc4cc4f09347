"""Overlap of segmentations: the loss to train on, and what is told of a case.

The Dice coefficient is equation 1 of Sarma et al., JAMIA 2021: 2 |A and B| / (|A| + |B|); two empty masks agree (1).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

#: A voxel belongs to the organ from this probability on.
THRESHOLD = 0.5


def soft_dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - 2 sum(p m) / (sum(p) + sum(m)), summed over the whole batch (b, 1, x, y, z) as MONAI's DiceLoss does.

    Over the batch [R], because a patch without organ has no Dice of its own. In float32 whatever the autocast: the sums
    over a patch are beyond what bfloat16 can count.
    """
    from monai.losses import DiceLoss

    with torch.autocast(logits.device.type, enabled=False):
        loss: Tensor = DiceLoss(sigmoid=True, batch=True)(logits.float(), masks.float())
    return loss


def dice_coefficient(found: Tensor, mask: Tensor) -> float:
    """Equation 1 for two masks of one shape."""
    both, sizes = int((found.bool() & mask.bool()).sum()), int(found.bool().sum()) + int(mask.bool().sum())
    return 2 * both / sizes if sizes else 1.0


@dataclass(frozen=True)
class CaseScore:
    """One case: `hd95` in mm, None where one of the masks is empty; volumes in ml."""

    id: str
    dice: float
    hd95: float | None
    volume: float
    reference_volume: float


def score_case(id_: str, found: Tensor, mask: Tensor, spacing: Sequence[float], millilitres: float) -> CaseScore:
    """Scores of a found mask against the reference, both (x, y, z), their voxels `spacing` mm apart along each axis and
    of a volume of `millilitres`, which is less than the product where the axes are skewed.

    The 95 % Hausdorff distance is MONAI's: the larger of the two directed 95th percentiles of surface distances.
    """
    from monai.metrics import compute_hausdorff_distance

    found, mask = found.bool(), mask.bool()
    distance = None
    if found.any() and mask.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distances = compute_hausdorff_distance(
                found[None, None], mask[None, None], include_background=True, percentile=95, spacing=list(spacing)
            )
        distance = float(distances)
    volumes = int(found.sum()) * millilitres, int(mask.sum()) * millilitres
    return CaseScore(id_, dice_coefficient(found, mask), distance, *volumes)


def summarise(cases: Sequence[CaseScore]) -> dict[str, float | None]:
    """dice (mean over cases), dice_sd, ci_low, ci_high (95 % of that mean, by Student's t), hd95 (mm, mean over the
    cases where it is defined), volume_error (ml, mean of absolute differences), n, n_missed (nothing found in them).

    What is not defined is None: all without cases, the spread of a single one.
    """
    n = len(cases)
    dice = np.array([case.dice for case in cases])
    known = [case.hd95 for case in cases if case.hd95 is not None]
    mean = float(dice.mean()) if n else None
    spread = float(dice.std(ddof=1)) if n > 1 else None
    half = float(stdtrit(n - 1, 0.975)) * spread / n**0.5 if spread is not None else None
    return {
        "dice": mean,
        "dice_sd": spread,
        "ci_low": max(0.0, mean - half) if mean is not None and half is not None else None,
        "ci_high": min(1.0, mean + half) if mean is not None and half is not None else None,
        "hd95": float(np.mean(known)) if known else None,
        "volume_error": float(np.mean([abs(case.volume - case.reference_volume) for case in cases])) if n else None,
        "n": n,
        "n_missed": sum(case.volume == 0 < case.reference_volume for case in cases),
    }
