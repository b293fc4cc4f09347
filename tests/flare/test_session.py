"""What an admin's session makes of FLARE's API: lines of a growing log, and one line for everything that is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvflare.apis.fl_exception import FLCommunicationError
from nvflare.fuel.common.excepts import ConfigError
from nvflare.fuel.flare_api import api_spec

from heterosync.errors import UserError
from heterosync.flare.running import session
from heterosync.flare.running.session import COMPLETED, AdminSession, ServerFailed, Unreachable

FROM_ELSEWHERE = [ConnectionResetError, TimeoutError, RuntimeError, FLCommunicationError, ConfigError]
ITS_OWN = [kind for _, kind in inspect.getmembers(api_spec, inspect.isclass) if issubclass(kind, Exception)]


class FakeSession:
    """FLARE's session to a server that runs one job. `looks`: what the server says at each look at it, the log or what
    its API raises; at the last one the job has ended."""

    def __init__(self, *looks: str | Exception, end: str = COMPLETED):
        self._looks = list(looks)
        self._end = end

    def get_job_meta(self, job_id: str) -> dict:
        if isinstance(self._looks[0], Exception):
            raise self._looks.pop(0)
        return {"status": "RUNNING" if len(self._looks) > 1 else self._end}

    def get_job_logs(self, job_id: str, target: str) -> dict:
        return {"logs": {"server": self._looks.pop(0)}}


def log_lines(*numbers: int, minute: int = 0) -> str:
    return "".join(f"2026-01-01 00:{minute:02d}:{n:02d},000 - heterosync - INFO - line {n}\n" for n in numbers)


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_POLL", 0.0)


def test_lines_are_told_once_also_after_flare_has_begun_a_new_log_file() -> None:
    half = log_lines(3)[:-4]
    looks = [log_lines(1), log_lines(1, 2), log_lines(1, 2) + half, log_lines(4, minute=1), log_lines(4, 5, minute=1)]
    lines: list[str] = []
    assert AdminSession(FakeSession(*looks)).follow("job", lines.append).completed
    assert lines == ["line 1", "line 2", "line 4", "line 5"]


ODD = "2026-01-01 00:00:09,000 - StreamThread - ERROR - streaming shutdown\n"
REFUSED = "2026-01-01 00:00:10,000 - Runner - ERROR - ConfigError: odd.Class not in allow_list\n"
OURS = "2026-01-01 00:00:11,000 - heterosync - ERROR - PROBLEM: site-b: another label\n"


@pytest.mark.parametrize(
    ("log", "begin", "end"),
    [
        ("", "FLARE ended the job with FINISHED:EXECUTION_EXCEPTION; a process of this job ended", "are kept"),
        (ODD, "FLARE ended the job with FINISHED:EXECUTION_EXCEPTION; a process", "says first: streaming shutdown"),
        (ODD + REFUSED, "ConfigError: odd.Class", "not in allow_list"),
        (ODD + REFUSED + OURS, "site-b: another", "label"),
    ],
    ids=["no error", "a consequence", "refused by FLARE", "our line"],
)
def test_a_failed_job_is_told_by_its_cause_before_its_consequences(log: str, begin: str, end: str) -> None:
    done = AdminSession(FakeSession(log_lines(1), log_lines(1) + log, end="FINISHED:EXECUTION_EXCEPTION")).follow("job")
    assert done.cause.startswith(begin) and done.cause.endswith(end)


@pytest.mark.parametrize("kind", ITS_OWN + FROM_ELSEWHERE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("text", ["two\nlines", ""])
def test_everything_that_the_api_raises_becomes_one_line(kind: type[Exception], text: str) -> None:
    def raises(*_: object, **__: object) -> None:
        raise kind(text) if kind is not api_spec.CommandError else kind("CODE", text)

    admin = AdminSession(SimpleNamespace(get_job_meta=raises, abort_job=raises, get_system_info=raises))
    for act in (lambda: admin.meta("job-7"), lambda: admin.abort("job-7"), admin.sites):
        with pytest.raises(UserError) as caught:
            act()
        assert len(str(caught.value).splitlines()) == 1 and ":" in str(caught.value) and "()" not in str(caught.value)


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), api_spec.NoConnection("none"), RuntimeError("odd")])
def test_following_goes_on_when_the_server_answers_again(error: Exception) -> None:
    lines: list[str] = []
    end = AdminSession(FakeSession(log_lines(1), error, error, log_lines(1, 2))).follow("job", lines.append)
    assert end.completed and lines == ["line 1", "line 2"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [(api_spec.NoConnection("none"), Unreachable), (api_spec.InternalError("odd"), ServerFailed)],
)
def test_following_ends_after_a_long_silence_and_can_begin_again(
    error: Exception, kind: type[UserError], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_OUTAGE", -1.0)
    lines: list[str] = []
    admin = AdminSession(FakeSession(log_lines(1), error, log_lines(1, 2)))
    with pytest.raises(kind, match="job job: .*the job may still run"):
        admin.follow("job", lines.append)
    assert admin.follow("job", lines.append).completed
    assert lines == ["line 1", "line 2"]


def test_what_will_not_pass_ends_the_following_at_once() -> None:
    with pytest.raises(UserError, match="job job: no such job: `nvflare job list`"):
        AdminSession(FakeSession(log_lines(1), api_spec.JobNotFound("no such job"))).follow("job")


def test_a_full_disk_at_a_download_is_one_line(tmp_path: Path) -> None:
    def download(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="the disk is full"):
        AdminSession(SimpleNamespace(download_job_result=download)).download("job", tmp_path)
