"""FLARE's interactive admin console, typed into as a lead does: log in, look, submit, follow, download, abort."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from federation_toys import Federation, federation, job_of, model_digest, oracle
from heterosync.flare.running.processes import package_environment
from heterosync.flare.running.session import COMPLETED
from toys import SMOKE, toy_alliance

pytestmark = [pytest.mark.flare, pytest.mark.slow, pytest.mark.secure]

LEAD, MEMBER = "lead@site-a.org", "member@site-a.org"
PROMPT = "> "
_TERMINAL_CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Console:
    """A running `fl_admin.sh` on a terminal of its own; `do` types a line and returns what the console answers."""

    def __init__(self, process: subprocess.Popen, terminal: int):
        self.process, self._terminal, self.shown = process, terminal, ""
        self._read = 0

    def expect(self, text: str, patience: float = 60) -> str:
        """What is shown up to and including `text`, from where the last call stopped."""
        end = time.monotonic() + patience
        while (place := self.shown.find(text, self._read)) < 0:
            assert time.monotonic() < end, f"not within {patience:g} s: {text!r}; the console shows\n{self.shown}"
            if select.select([self._terminal], [], [], 0.2)[0]:
                self.shown += _TERMINAL_CODES.sub("", os.read(self._terminal, 65536).decode(errors="replace"))
        answer, self._read = self.shown[self._read : place + len(text)], place + len(text)
        return answer

    def type(self, line: str) -> None:
        os.write(self._terminal, f"{line}\n".encode())
        self.expect(line)  # the terminal's echo

    def do(self, line: str) -> str:
        self.type(line)
        return self.expect(f"\n{PROMPT}")

    def until(self, line: str, text: str, patience: float) -> str:
        """Type `line` again and again until its answer holds `text`."""
        end = time.monotonic() + patience
        while text not in (answer := self.do(line)):
            assert time.monotonic() < end, f"not within {patience:g} s: {text!r} after {line!r}; it says\n{answer}"
            time.sleep(1)
        return answer


@contextmanager
def console(running: Federation, user: str) -> Iterator[Console]:
    """The console of an admin's kit, logged in; ended at the latest at the end of the block."""
    kit, home = running.alliance.kits[user], running.alliance.root / "home" / user
    home.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", str(kit / "startup" / "fl_admin.sh")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**package_environment(dict(os.environ)), "HOME": str(home), "PATH": path, "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        typed = Console(process, ours)
        typed.expect("User Name: ")
        typed.do(user)
        yield typed
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
        process.wait()
        os.close(ours)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("console")


@pytest.fixture(scope="module")
def data(root: Path) -> dict[str, Path]:
    return toy_alliance(root / "data", 2)


@pytest.fixture(scope="module")
def running(root: Path, data: dict[str, Path]) -> Iterator[Federation]:
    with federation(root / "alliance", data) as started:
        yield started


def submitted(answer: str) -> str:
    """The id of the job that the console says it submitted."""
    found = re.search(r"[Ss]ubmitted job:? *([0-9a-f-]{36})", answer)
    assert found, answer
    return found.group(1)


def test_a_lead_submits_and_follows_a_job_in_the_console(running, root, data):
    job = job_of(root, "typed")
    with console(running, LEAD) as typed:
        clients = typed.do("check_status server")
        assert "site-a" in clients and "site-b" in clients
        job_id = submitted(typed.do(f"submit_job {job}"))
        assert job_id in typed.do("list_jobs")
        typed.until(f"get_job_meta {job_id}", COMPLETED, 180)
        assert "content downloaded to" in typed.do(f"download_job {job_id}")
        typed.type("bye")
        assert typed.process.wait(timeout=30) == 0
    results = list(running.alliance.kits[LEAD].rglob("last_model.pt"))
    assert [model_digest(path) for path in results] == [oracle(root, data)]


def test_a_running_job_is_aborted_in_the_console(running, root):
    job = job_of(root, "endless", training={**SMOKE, "rounds": 200})
    with console(running, LEAD) as typed:
        job_id = submitted(typed.do(f"submit_job {job}"))
        typed.until(f"get_job_meta {job_id}", '"RUNNING"', 60)
        typed.type(f"abort_job {job_id}")
        typed.expect("Are you sure (y/N): ")
        typed.do("y")
        typed.until(f"get_job_meta {job_id}", "FINISHED:ABORTED", 60)
        typed.type("bye")
        assert typed.process.wait(timeout=30) == 0


def test_a_member_looks_but_cannot_submit_in_the_console(running, root):
    with console(running, MEMBER) as typed:
        assert "site-b" in typed.do("check_status server")
        answer = typed.do(f"submit_job {job_of(root, 'forbidden')}")
        assert "not authorized" in answer.lower(), answer
        typed.type("bye")
        assert typed.process.wait(timeout=30) == 0
