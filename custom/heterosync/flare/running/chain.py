"""A training as a chain of jobs, run by an admin: submit a segment, follow and download it, submit the next.

All that the command must remember lies in `chain.json`, written in one step before and after each act: cut off at any
point and started again, it goes on. A segment that failed is replaced by another from the round that the server stored;
so is one that a lost server left RUNNING for ever (FLARE 2.9 neither resumes nor ends such a job). A server that
cannot be reached is waited for: the job goes on without us.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

from nvflare.apis.utils.job_submit_token import canonical_job_content_hash

from heterosync.errors import UserError
from heterosync.federation.results import RUN
from heterosync.federation.trainings import NOT_STORED, difference, learning_info
from heterosync.files import explained, make_folder, read_json, write_json
from heterosync.flare.jobs.folder import is_swarm, read_learning
from heterosync.flare.jobs.segments import segment_job
from heterosync.flare.running.collect import collect_results
from heterosync.flare.running.session import JobEnd, ServerFailed, Unreachable

_T = TypeVar("_T")

STATE = "chain.json"
LOST = "LOST"
#: Downloads of segments that are kept, of which the last is the source of `results`.
KEPT = 2
#: Seconds between two looks whether a job is lost, and how many must say so one after the other.
_LOOK, _LOOKS = 5.0, 2


class Engine(Protocol):
    """Where the jobs of a chain run; `AdminSession` is one. All may raise `Unreachable`, and be called again then."""

    def sites(self) -> list[str]:
        """Names of the sites that are connected now."""

    def submit(self, job: Path, token: str) -> str:
        """Id of the submitted job; the same token again gives the same job, not a second one."""

    def follow(self, job_id: str, say: Callable[[str], None], *, while_waiting: Callable[[], None]) -> JobEnd:
        """Wait for the end of a job; `while_waiting` is called now and then and may raise."""

    def download(self, job_id: str, out: Path) -> Path:
        """The server's folder of a finished job, put below `out`."""

    def lost(self, job_id: str) -> bool:
        """Whether FLARE calls the job running for ever, since its server was restarted."""


class _ServerLost(Exception):
    pass


class Chain:
    """One training, as segments of `segment_rounds` rounds of `job`; results and state lie in `out`.

    attempts: segments in a row that may end without a finished round; a lost server is not counted. wait: seconds that
    a segment waits for the sites of the one before; FLARE gives a job to the sites that are connected when it begins.
    Raises `UserError` when `out` belongs to a training with other settings, and for a swarm job: nothing can go on with
    that.
    """

    def __init__(
        self,
        job: Path | str,
        out: Path | str,
        segment_rounds: int,
        say: Callable[[str], None] = print,
        attempts: int = 3,
        wait: float = 60.0,
        look: float = _LOOK,
    ):
        self.job, self.out, self.segment_rounds = Path(job), Path(out), segment_rounds
        self._say, self._attempts, self._wait, self._look = say, attempts, wait, look
        self._learning = learning_info(**read_learning(self.job))
        if is_swarm(self.job):
            raise UserError(f"{self.job}: a swarm's server keeps no model to go on from: submit it as one job")
        self._state: dict[str, Any] = {
            **self._learning,
            "chain": uuid.uuid4().hex,
            "training_id": "",
            "sites": [],
            "rounds": 0,
            "failures": 0,
            "segments": [],
            "done": False,
        }
        if (self.out / STATE).exists():
            self._state = read_json(self.out / STATE)
            other = difference(self._learning, {name: self._state.get(name) for name in self._learning})
            if other:
                raise UserError(f"{self.out} holds a chain with another {other}: choose another --out")
            self._extend()
        elif self.out.is_dir() and any(self.out.iterdir()):
            raise UserError(f"{self.out} holds other files than a chain's: choose another --out")

    def run(self, engine: Engine) -> Path:
        """Run what is left; the folder of the last results. Raises `UserError` when segments fail without progress."""
        while not self._state["done"]:
            if self._state["failures"] >= self._attempts:
                cause = self._state["segments"][-1]["cause"] or "no cause was given"
                self._state["failures"] = 0  # started again by hand, it tries again
                self._write()
                count = f"{self._attempts} segments in a row ended without a finished round"
                raise UserError(f"{count}; the last one: {cause}; mend that and run the same command again")
            segments: list[dict[str, Any]] = self._state["segments"]
            if not segments or segments[-1]["status"]:
                segments.append({"job_id": "", "status": "", "cause": "", "rounds": None})
                self._write()
            self._play(engine, segments[-1], len(segments))
        return self.out / "results"

    def summary(self) -> dict[str, Any]:
        """Id of the training, rounds done, and its segments in order."""
        return {name: self._state[name] for name in ("training_id", "rounds", "segments")}

    # -- one segment ---------------------------------------------------------------------------------------------------

    def _play(self, engine: Engine, segment: dict[str, Any], number: int) -> None:
        if not segment["job_id"]:
            self._wait_for_sites(engine)
            job = self._write_job(number)
            content = canonical_job_content_hash(str(job)).removeprefix("sha256:")[:16]
            token = f"{self._state['chain']}-{number}-{content}"  # a job that was changed since is another one
            segment["job_id"] = self._patiently(engine, lambda: engine.submit(job, token))
            self._write()
            self._say(f"segment {number}: job {segment['job_id']}, after {self._state['rounds']} rounds")
        job_id = segment["job_id"]
        end = self._follow(engine, job_id)
        record = None if end.status == LOST else self._fetch(engine, job_id, number)
        segment.update(status=end.status, cause=end.cause)
        lost = end.status == LOST
        if lost:
            self._state["training_id"] = self._state["training_id"] or job_id
        elif record is not None:
            self._state["training_id"] = record.get("training_id") or self._state["training_id"]
        elif NOT_STORED in end.cause and not self._state["rounds"]:
            self._state["training_id"], lost = "", True  # the first job was lost before it stored anything: begin anew
        if record and record["rounds"]:
            self._state["sites"] = record["rounds"][-1]["contributors"]
        rounds = len(record["rounds"]) if record else self._state["rounds"]
        completed = bool(record) and record["status"] == "completed"  # type: ignore[index]
        if completed or rounds > self._state["rounds"]:
            self._state["failures"] = 0
        elif not lost:
            self._state["failures"] += 1
        segment["rounds"] = self._state["rounds"] = rounds
        self._state["done"] = completed
        self._write()
        cause = f": {end.cause}" if end.cause else ""
        self._say(f"segment {number}: {end.status}, {rounds} of {self._total} rounds done{cause}")

    def _wait_for_sites(self, engine: Engine) -> None:
        end = time.monotonic() + self._wait
        while missing := sorted(set(self._state["sites"]) - set(self._patiently(engine, engine.sites))):
            if time.monotonic() > end:
                self._say(f"no longer waiting for {', '.join(missing)}: they may return in a later segment")
                return
            time.sleep(min(1.0, self._look))

    def _patiently(self, engine: Engine, act: Callable[[], _T]) -> _T:
        """What `act` gives, which is asked again once the server can be reached, however long that takes."""
        while True:
            try:
                return act()
            except Unreachable as error:
                self._say(f"waiting for the server: {error}")
            while True:
                with suppress(Unreachable, ServerFailed):
                    engine.sites()
                    break
                time.sleep(self._look)
            self._say("the server answers again")

    def _write_job(self, number: int) -> Path:
        folder = self.out / "jobs" / f"{number:03d}"
        with explained(folder):
            shutil.rmtree(folder, ignore_errors=True)
        return segment_job(self.job, folder, self._state["training_id"], self.segment_rounds)

    def _follow(self, engine: Engine, job_id: str) -> JobEnd:
        looked, absent = time.monotonic() - self._look, 0

        def look() -> None:
            nonlocal looked, absent
            if time.monotonic() - looked < self._look:
                return
            looked = time.monotonic()
            try:
                absent = absent + 1 if engine.lost(job_id) else 0
            except UserError:
                return  # the server is out of reach: `follow` knows for how long that may be
            if absent >= _LOOKS:
                raise _ServerLost

        try:
            return self._patiently(engine, lambda: engine.follow(job_id, self._say, while_waiting=look))
        except _ServerLost:
            cause = f"the server was restarted: FLARE calls job {job_id} running for ever, though nothing runs"
            self._say(f"{cause}; a new job goes on with the training")
            return JobEnd(job_id, LOST, cause)

    def _fetch(self, engine: Engine, job_id: str, number: int) -> dict[str, Any] | None:
        """Download a job; its run.json, None when it has none. The latest record is at `results`."""
        target = self.out / "segments" / f"{number:03d}"
        with explained(target):
            shutil.rmtree(target, ignore_errors=True)
        try:
            folder = self._patiently(engine, lambda: engine.download(job_id, make_folder(target)))
        except UserError as error:
            self._say(f"segment {number}: nothing to download: {error}")
            return None
        if not (folder / RUN).exists():
            return None
        collect_results(folder, self.out / "results")
        for earlier in sorted(target.parent.iterdir(), key=lambda folder: int(folder.name))[:-KEPT]:
            with explained(earlier):
                shutil.rmtree(earlier)
        return dict(read_json(folder / RUN))

    # -- state ---------------------------------------------------------------------------------------------------------

    @property
    def _total(self) -> int:
        return int(self._learning["training"]["rounds"])

    def _extend(self) -> None:
        """Take more rounds than a finished chain had as a wish to go on."""
        self._state["training"] = self._learning["training"]
        if self._state["done"] and self._total > self._state["rounds"]:
            self._state["done"] = False

    def _write(self) -> None:
        write_json(self.out / STATE, self._state)
