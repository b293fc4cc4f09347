"""A sign of life: what works for long calls `beat` at every batch and every image, and a supervisor may listen.

A heartbeat out of the work itself stops when the work hangs; one of a thread beside it would go on. It is also where
work that nobody waits for any more ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from heterosync.errors import Aborted

_listener: Callable[[], None] | None = None
_ended: ContextVar[Callable[[], bool]] = ContextVar("ended", default=lambda: False)


def listen(listener: Callable[[], None] | None) -> None:
    """Let `listener` be called, on any thread, at every beat in this process; None ends that."""
    global _listener
    _listener = listener


@contextmanager
def until(ended: Callable[[], bool]) -> Iterator[None]:
    """In here and on this thread, the first beat after `ended` says True raises `Aborted`."""
    token = _ended.set(ended)
    try:
        yield
    finally:
        _ended.reset(token)


def beat() -> None:
    """Say that the work goes on. Raises `Aborted` where it need not."""
    if _listener is not None:
        _listener()
    if _ended.get()():
        raise Aborted("the job was aborted")
