"""What ends a job, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext

from heterosync.errors import HeteroSyncError

log = logging.getLogger("heterosync")


class Stopped(HeteroSyncError):
    """The job cannot go on; the text says why, one line per cause."""


def guarded(component: FLComponent, fl_ctx: FLContext, what: Callable[..., None], *args: Any) -> None:
    """`_guarded` for the server's other components; the controller puts the cause on record."""
    try:
        what(*args)
    except Exception as error:
        component.system_panic("; ".join(cause_of(error).splitlines()), fl_ctx)


def cause_of(error: Exception) -> str:
    """What is said of an error that ends the job; of one that nobody foresaw, the traceback goes into the log."""
    if isinstance(error, HeteroSyncError):
        return str(error)
    log.error("an unexpected error ends the job", exc_info=error)
    return f"{type(error).__name__}: {error}"
