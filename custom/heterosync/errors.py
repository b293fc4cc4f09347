"""The errors that heterosync raises on purpose.

Everything that a user can mend is a `UserError`: its text is one clear line that names the file, row, site or setting
and says what to do. The command line prints that line and ends with exit code 1; anything else is a defect and keeps
its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class HeteroSyncError(Exception):
    """Base of all errors of this package."""


class UserError(HeteroSyncError):
    """A mistake that the user can mend; `str(error)` is one line."""


class SiteError(UserError):
    """A mistake at one site, which the text names: whoever catches it needs not say where it was."""


class ProblemList(UserError):
    """Several mistakes found at once; `problems` holds one line each, `str(error)` joins them with line ends."""

    def __init__(self, problems: Sequence[str]):
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class ContributionRefused(HeteroSyncError):
    """A site's contribution cannot enter the fusion of this round."""

    def __init__(self, site: str, reason: str):
        super().__init__(f"contribution of site {site} refused: {reason}")
        self.site = site
        self.reason = reason


class Aborted(HeteroSyncError):
    """The job was ended from outside while this process worked for it."""


class TrainerDied(HeteroSyncError):
    """The trainer process of a site ended while it held a task; the site loses the round, not the job."""


class TrainerHung(TrainerDied):
    """The trainer process gave no sign of life for too long and was killed."""


def nearest(word: str, known: Iterable[str]) -> str:
    """A tail for an error line: the nearest known name, and all of them."""
    known = sorted(known)
    close = closest(word, known)
    hint = f"did you mean '{close}'? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that `word` may be a misspelling of."""
    return next(iter(difflib.get_close_matches(word, sorted(known), n=1)), None)
