"""Processes that this package starts: what they need to find it, and how to end every last one of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

import heterosync

#: Environment variable that every process of one federation inherits. FLARE puts its workers into sessions of their
#: own and lets them outlive their parents: neither process group nor tree finds them all, this does.
MARK = "HETEROSYNC_RUN"


def package_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """`environment`, in which Python also finds this package where it is not installed."""
    root = str(Path(heterosync.__file__).resolve().parents[1])
    paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    return {**environment, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


def marked(mark: str) -> list[psutil.Process]:
    """Living processes, other than this one, that carry `mark` in their environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def end_marked(mark: str, grace: float = 0.0, patience: float = 15.0) -> None:
    """Wait `grace` seconds for the marked processes to end by themselves, then kill what is left, at most `patience`
    seconds long: a daemon may start another while we look."""
    now = time.monotonic()
    kill_at, stop_at = now + grace, now + grace + patience
    while left := marked(mark):
        if time.monotonic() >= kill_at:
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=1)
        if time.monotonic() > stop_at:
            return
        time.sleep(0.1)


@contextmanager
def ends_on_signal() -> Iterator[None]:
    """Let SIGTERM end this process the orderly way, as Ctrl-C does, so that what it started is stopped with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
