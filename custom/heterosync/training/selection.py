"""Choosing a round and noticing a plateau by validation AUC (paper, Model development)."""

from __future__ import annotations


class Plateau:
    """`count` successive gains below `gain`, each over the value before."""

    def __init__(self, gain: float = 0.005, count: int = 3):
        self.gain = gain
        self.count = count
        self._last: float | None = None
        self._flat = 0

    def update(self, value: float) -> bool:
        """Take the next round's value; true while the last `count` gains were all below `gain`."""
        if self._last is not None:
            self._flat = self._flat + 1 if value - self._last < self.gain else 0
        self._last = value
        return self._flat >= self.count


class BestRound:
    """The highest value and its round; ties go to the later round."""

    def __init__(self) -> None:
        self.round: int | None = None
        self.value: float | None = None

    def update(self, round_: int, value: float | None) -> bool:
        """True if this round is the best so far. An undefined value (None) never wins over a defined one."""
        better = self.value is None or (value is not None and value >= self.value)
        if better:
            self.round, self.value = round_, value
        return better
