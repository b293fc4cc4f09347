"""Anchor sets with nothing in them to learn, against which an anchor task must show its worth (docs/anchor.md)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from heterosync.data.grey import to_uint8

#: name -> what it does, in words.
CONTROLS = {
    "shuffled_labels": "the labels stand beside other pictures: the task is public, and nothing in it generalises",
    "noise_pixels": "every picture is noise of its size: there is nothing to see",
}


def controlled(
    images: Sequence[np.ndarray], labels: Sequence[int] | np.ndarray, name: str, control: str | None, seed: int
) -> tuple[list[np.ndarray], np.ndarray, str]:
    """Pictures, labels and name of an anchor set under a control of `CONTROLS`; None leaves it as it is.

    How many pictures and labels of a kind there are stays the same; `seed` decides on the noise and the order. All
    sites that are given the outcome have the same anchor set.
    """
    pictures, labels = [to_uint8(image) for image in images], np.asarray(labels)
    if control is None:
        return pictures, labels, name
    rng = np.random.default_rng([seed, sorted(CONTROLS).index(control)])
    if control == "shuffled_labels":
        labels = rng.permutation(labels)
    else:
        pictures = [rng.integers(0, 256, picture.shape, dtype=np.uint8) for picture in pictures]
    return pictures, labels, f"{name}, {control.replace('_', ' ')}"
