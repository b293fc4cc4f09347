"""One job from an admin's kit: submit it, follow it with a line per site and round, download its record.

The same for a POC and for a provisioned alliance; FLARE's own API does the talking. Every way in which the server
refuses becomes a `UserError`.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nvflare.apis.fl_exception import FLCommunicationError
from nvflare.apis.job_def import JobMetaKey
from nvflare.fuel.common.excepts import ConfigError
from nvflare.fuel.flare_api import api_spec
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from heterosync.errors import UserError
from heterosync.files import explained, make_folder, read_json
from heterosync.flare import messages

#: What FLARE calls a job that ran to its end; every other end is a failure.
COMPLETED = "FINISHED:COMPLETED"
_FINISHED, _SUBMITTED = "FINISHED", "SUBMITTED"
#: What FLARE's word for an end means here.
_MEANING = {
    "FINISHED:EXECUTION_EXCEPTION": "a process of this job ended at the server or at a site (killed, out of memory?), "
    "which ends the whole job; the models of the rounds that were done are kept",
    "FINISHED:ABNORMAL": "a site was lost on the way, or could not load the job; its own log.txt says why",
    "FINISHED:ABORTED": "somebody aborted it",
}
_POLL = 1.0  # seconds between two looks at a job
_OUTAGE = 120.0  # seconds that the server may be out of reach before we stop following
_OURS = re.compile(r"\S+ \S+ - heterosync - [A-Z]+ - (?P<text>.*)")
_LINE = re.compile(r"\S+ \S+ - \S+ - (?P<level>[A-Z]+) - (?:\[.*?\](?::| -) )?(?P<text>.*)")
_REFUSED = re.compile("not in allow_list|ConfigError|ComponentNotAuthorized|No module named 'het")


class Unreachable(UserError):
    """The server cannot be reached; the same may be asked again later."""


class ServerFailed(UserError):
    """The server was reached and failed at what it was asked."""


_LOST = "the server cannot be reached ({error}): is it running, is the port open?"
_FAILED = "the server failed at it ({error}): try again; its own log.txt says why"
#: What the exceptions of FLARE's API mean; the first kind that fits counts.
_MEANINGS: tuple[tuple[type[Exception], str], ...] = (
    *((kind, _LOST) for kind in (ConnectionError, TimeoutError, FLCommunicationError, api_spec.NoReply)),
    *((kind, _FAILED) for kind in (api_spec.InternalError, RuntimeError)),
    (api_spec.AuthorizationError, "the server gives this user no right to do that: use the kit of a lead"),
    (api_spec.AuthenticationError, "the server does not accept this kit ({error}): is it of this alliance?"),
    (api_spec.SessionClosed, "the server has closed this session ({error}): run the command again"),
    (api_spec.InvalidJobDefinition, "{error}: write it anew with `heterosync job export`"),
    (api_spec.JobNotFound, "{error}: `nvflare job list` shows what there is"),
    (api_spec.JobNotDone, "{error}: wait for its end, or abort it"),
    (api_spec.JobNotRunning, "{error}: `nvflare job list` shows how it ended"),
    (api_spec.SubmitTokenConflict, "was submitted before with other content ({error}): submit it as it was, or anew"),
    (api_spec.SubmitTokenJobDeleted, "was submitted before, and deleted since ({error}): submit it anew"),
    (api_spec.NoClientsAvailable, "no site is connected: wait for the first one"),
    (api_spec.ClientsStillRunning, "{error}: wait until they have ended"),
    (
        api_spec.InvalidTarget,
        "the server does not know the site ({error}): `nvflare system status` names those it knows",
    ),
    (api_spec.InvalidArgumentError, "FLARE does not take that ({error}): mend it"),
    (api_spec.CommandError, "the server refuses ({error}): mend that"),
    (api_spec.JobTimeout, "{error}: look with `nvflare job meta`"),
    (ConfigError, "the kit is not whole ({error}): look with `heterosync kit verify`"),
)


@dataclass(frozen=True)
class JobEnd:
    """How a job ended: FLARE's id and status of it, and "" or the lines that say what to mend."""

    job_id: str
    status: str
    cause: str

    @property
    def completed(self) -> bool:
        return self.status == COMPLETED


@contextmanager
def admin_session(kit: Path | str, timeout: float = 30.0) -> Iterator[AdminSession]:
    """Log in with an admin's kit (the folder that holds `startup/`), waiting at most `timeout` seconds for the server.

    Raises `UserError` when the kit is none, the server is out of reach or does not accept the admin.
    """
    kit = Path(kit).absolute()
    config = kit / "startup" / "fed_admin.json"
    if not config.is_file():
        raise UserError(f"{kit} is not the kit of an admin: it has no startup/fed_admin.json")
    admin = read_json(config)["admin"]
    with _explained(f"{admin['username']} at {admin['host']}:{admin['port']}"):
        session = new_secure_session(admin["username"], str(kit), timeout=timeout)
    try:
        yield AdminSession(session)
    finally:
        session.close()


class AdminSession:
    """What an admin does with a job. Raises `UserError` for all that the server refuses."""

    def __init__(self, session: Session):
        self._session = session
        self._logs: dict[str, _JobLog] = {}

    def sites(self) -> list[str]:
        """Names of the sites that are connected now."""
        with _explained("the list of sites"):
            return sorted(client.name for client in self._session.get_system_info().client_info)

    def lost(self, job_id: str) -> bool:
        """Whether FLARE calls a job running that no process runs, since the server was started anew after it began."""
        with _explained(f"job {job_id}"):
            meta, system = self._session.get_job_meta(job_id), self._session.get_system_info()
        began = meta.get(JobMetaKey.START_TIME.value) or meta.get(JobMetaKey.SUBMIT_TIME_ISO.value)
        if meta.get(JobMetaKey.STATUS.value) not in ("RUNNING", "DISPATCHED") or not began:
            return False
        known = {job.job_id for job in system.job_info}
        return job_id not in known and float(system.server_info.start_time) > datetime.fromisoformat(began).timestamp()

    def submit(self, job: Path | str, token: str | None = None) -> str:
        """Submit a job folder; returns FLARE's id of the job. A copy is sent: FLARE signs the folder it submits.

        token: submitted again with the same one, the job is not submitted a second time.
        """
        job = Path(job).absolute()
        if not (job / "meta.json").is_file():
            raise UserError(f"{job} is not a job folder (no meta.json): write one with `heterosync job export`")
        with tempfile.TemporaryDirectory() as temporary, _explained(f"job {job.name}"):
            copy = shutil.copytree(job, Path(temporary) / job.name)
            return str(self._session.submit_job(str(copy), submit_token=token))

    def follow(
        self,
        job_id: str,
        say: Callable[[str], None] = print,
        timeout: float | None = None,
        while_waiting: Callable[[], None] | None = None,
    ) -> JobEnd:
        """Wait for the end of a job and say each of its lines once, also when it is followed again.

        timeout: seconds; after them the job is aborted and a `UserError` raised. while_waiting: called at every look.
        Raises `Unreachable` or `ServerFailed` when nothing is heard of the job for two minutes.
        """
        log, waiting = self._logs.setdefault(job_id, _JobLog()), ""
        start = heard = time.monotonic()
        while True:
            now = time.monotonic()
            try:
                meta, text = self.meta(job_id), self._log_of(job_id)
                heard = now
            except (Unreachable, ServerFailed) as error:
                if now - heard > _OUTAGE:
                    line = f"{error} (for {_OUTAGE:.0f} s now; the job may still run)"
                    raise type(error)(line) from error
                meta, text = {}, ""
            log.read(text, say)
            status = str(meta.get(JobMetaKey.STATUS.value, ""))
            if status.startswith(_FINISHED):
                cause = "" if status == COMPLETED else log.cause() or _reason(meta, status, log.errors)
                return JobEnd(job_id, status, cause)
            if status == _SUBMITTED and (why := _not_scheduled(meta)) != waiting:
                waiting = why
                say(f"the job waits: {why}")
            if timeout is not None and now - start > timeout:
                self.abort(job_id)
                raise UserError(_too_late(job_id, timeout, waiting))
            if while_waiting is not None:
                while_waiting()
            time.sleep(_POLL)

    def abort(self, job_id: str) -> None:
        with _explained(f"job {job_id}"):
            self._session.abort_job(job_id)

    def meta(self, job_id: str) -> dict[str, Any]:
        """What FLARE keeps of a job: status, submitter, sites, what happened at its deployment."""
        with _explained(f"job {job_id}"):
            return dict(self._session.get_job_meta(job_id))

    def download(self, job_id: str, out: Path | str) -> Path:
        """Put a finished job's folder below `out`; returns the server's part of it, with history.csv and models."""
        with _explained(f"the result of job {job_id}"), explained(out):
            location = self._session.download_job_result(job_id, str(make_folder(out)))
        return Path(location) / "workspace"

    def _log_of(self, job_id: str) -> str:
        with _explained(f"the log of job {job_id}"):
            try:
                return str(self._session.get_job_logs(job_id, "server")["logs"].get("server") or "")
            except (api_spec.JobNotFound, api_spec.JobNotRunning, AttributeError, KeyError):
                return ""  # not yet deployed, or moved to the store just now
            except api_spec.AuthorizationError:
                return ""  # a policy without the right `get_job_log`: the end of the job is seen all the same


class _JobLog:
    """Reads the server's log of a job as it grows: tells our lines, remembers what explains a failure.

    FLARE begins a new file after every 20 MiB and gives out that one only. What it wrote into the old one after our
    last look, a moment before, stays unread.
    """

    def __init__(self) -> None:
        self._first, self._read = "", 0  # the first line, which has the time in it, tells one file from the next
        self._problems: list[str] = []
        self.errors: list[str] = []

    def read(self, text: str, say: Callable[[str], None]) -> None:
        lines = text.splitlines()
        if text and not text.endswith("\n"):
            lines.pop()  # still being written
        if lines and lines[0] != self._first:
            self._first, self._read = lines[0], 0
        for line in lines[self._read :]:
            self._take(line, say)
        self._read = max(self._read, len(lines))

    def _take(self, line: str, say: Callable[[str], None]) -> None:
        found = _LINE.match(line)
        if found is None:
            return
        level, text = found.group("level", "text")
        if text.startswith(messages.PROBLEM):
            self._problems.append(text.removeprefix(messages.PROBLEM))
            say(self._problems[-1])
        elif ours := _OURS.match(line):
            say(ours.group("text"))
        elif level in ("ERROR", "CRITICAL"):
            self.errors.append(text)

    def cause(self) -> str:
        """What ended the job, where a line of ours or one of FLARE's that refuses it says so; else ""."""
        if self._problems:
            return "\n".join(dict.fromkeys(self._problems))
        return next((error for error in self.errors if _REFUSED.search(error)), "")


def _too_late(job_id: str, timeout: float, waiting: str) -> str:
    never = f"; it was never started: {waiting}" if waiting else ""
    return f"job {job_id} was not finished within {timeout:g} s and was aborted{never}"


def _not_scheduled(meta: dict[str, Any]) -> str:
    """Why the scheduler did not start a job at its last look; "" when it did not look yet."""
    history = meta.get(JobMetaKey.SCHEDULE_HISTORY.value) or [""]
    return str(history[-1]).partition(": ")[2] or str(history[-1])


def _reason(meta: dict[str, Any], status: str, errors: list[str]) -> str:
    """What FLARE wrote down about a job that failed without a word of ours: who refused it, or why it never began; and
    the first error of the server's log, which may be no more than a consequence."""
    details = meta.get(JobMetaKey.JOB_DEPLOY_DETAIL.value) or meta.get(JobMetaKey.SCHEDULE_HISTORY.value) or []
    told = [str(detail) for detail in details if "OK" not in str(detail).split()[-1:]]
    meaning = [_MEANING[status]] if status in _MEANING else []
    logged = [f"the server's log says first: {error}" for error in errors[:1]]
    return "; ".join([f"FLARE ended the job with {status}", *meaning, *told[-3:], *logged])


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn what FLARE's API raises into one line for the user."""
    try:
        yield
    except tuple(kind for kind, _ in _MEANINGS) as error:
        meaning = next(meaning for kind, meaning in _MEANINGS if isinstance(error, kind))
        own = {_LOST: Unreachable, _FAILED: ServerFailed}.get(meaning, UserError)
        said = " ".join(str(error).split()) or type(error).__name__
        raise own(f"{what}: {meaning.format(error=said)}") from error
