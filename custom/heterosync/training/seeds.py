"""Random streams named by what they are for, never by what ran before.

A stream depends on (seed, site, round, epoch, purpose) alone: restarts, several sites in one process and a process per
site draw the same numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_of(*parts: object) -> int:
    """A 63-bit number from the parts' text, equal on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def stream(*parts: object) -> np.random.Generator:
    """The generator of these parts."""
    return np.random.default_rng(seed_of(*parts))
