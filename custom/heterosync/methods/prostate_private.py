"""Private prostate segmentation: every site trains its own 3D AH-Net alone (Sarma et al. 2021)."""

from __future__ import annotations

from heterosync.methods.base import VOLUME_LEAVES, Method
from heterosync.training import SEGMENTATION


class ProstatePrivate(Method):
    """The private models of Sarma et al., JAMIA 28(6), 2021: local learning with the network and recipe of
    `prostate_ahnet`.

        site k:  w_k <- epochs of soft Dice loss from w_k, the best snapshot of the round before

    Sent: no tensor. All sites start from the same initial values.

    Degenerates: it is `prostate_ahnet` with a single site.
    """

    name = "prostate_private"
    title = "Private 3D AH-Net"
    status = "reconstruction"
    citation = "Sarma et al., JAMIA 28(6), 2021, doi 10.1093/jamia/ocaa341"
    leaves = VOLUME_LEAVES
    task = SEGMENTATION
    weighting = "none"
    personal = True
