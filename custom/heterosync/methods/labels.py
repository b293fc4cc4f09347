"""What the counts of a site's labels say."""

from __future__ import annotations

import math
from collections.abc import Sequence


def label_entropy(counts: Sequence[float]) -> float:
    """-sum p ln p of the shares of the classes, in nats; 0 where all are of one class."""
    shares = [count / sum(counts) for count in counts if count]
    return sum(-share * math.log(share) for share in shares)


def equitability(counts: Sequence[float]) -> float:
    """Shannon's: the entropy divided by its largest value; 1 for equal counts, 0 for a single class."""
    return min(1.0, label_entropy(counts) / math.log(len(counts)))
