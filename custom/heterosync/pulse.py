"""A sign of life: what works for long calls `beat` at every batch and every image, and a supervisor may listen.

A heartbeat out of the work itself stops when the work hangs; one of a thread beside it would go on.
"""

from __future__ import annotations

from collections.abc import Callable

_listener: Callable[[], None] | None = None


def listen(listener: Callable[[], None] | None) -> None:
    """Let `listener` be called, on any thread, at every beat in this process; None ends that."""
    global _listener
    _listener = listener


def beat() -> None:
    """Say that the work goes on."""
    if _listener is not None:
        _listener()
