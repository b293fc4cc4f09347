"""One run of a study, carried out in this process: the runner starts one process for each, and so can a cluster."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from heterosync.errors import UserError
from heterosync.federation.results import RUN
from heterosync.files import held, read_json, try_lock, write_json
from heterosync.methods import get_method
from heterosync.study.layout import FAILED, PROGRESS, WORK, Done, RunSpec, read_done, read_spec, write_done
from heterosync.study.running.engines import Engine, InProcess
from heterosync.study.running.job import Job
from heterosync.study.running.kinds import KINDS
from heterosync.study.running.plan import AnyPlan
from heterosync.study.running.record import read_study, run_folder

#: Environment variable with the process that started this one; a run ends with it.
PARENT = "HETEROSYNC_STUDY_PARENT"
#: Seconds between two looks at memory and rounds.
PACE = 0.5


def play(study: Path, run: str, engines: Mapping[str, Engine], say: Callable[[str], None] = print) -> Done:
    """Carry out the run `run` (scenario/level/repeat/label) of a study that `prepare` has laid out, or what is left.

    A run that is done is not repeated. Raises `UserError`; the cause is also kept, in failed.json.
    """
    study = Path(study)
    plan, folder = read_study(study).plan, run_folder(study, run)
    spec = read_spec(folder)
    with held(folder / ".lock", f"run {spec.name} is carried out by another process: wait for its end"):
        done = read_done(folder)
        if done is not None and done.digest == spec.digest:
            say(f"{spec.name} is done already")
            return done
        (folder / FAILED).unlink(missing_ok=True)
        engine = InProcess() if get_method(spec.method).pooled else engines[plan.engine]
        try:
            return _play(study, plan, folder, spec, engine, say)
        except Exception as error:
            cause = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            note_failure(folder, cause)
            raise


def note_failure(folder: Path, cause: str) -> None:
    """Keep why a run failed, in one line."""
    line = "; ".join(filter(None, (part.strip() for part in cause.splitlines())))
    write_json(folder / FAILED, {"cause": line or "no cause was told", "failed": _now()})


def _play(study: Path, plan: AnyPlan, folder: Path, spec: RunSpec, engine: Engine, say: Callable[[str], None]) -> Done:
    job = Job(study, plan, folder, spec, engine, say)
    with Watch(folder, engine.record(job.work)) as watch:
        cost = KINDS[plan.task].carry_out(job)
    done = Done(
        digest=spec.digest,
        seconds=round(watch.seconds, 3),
        peak_memory_bytes=watch.peak,
        bytes_per_site_round=cost.bytes_per_site_round,
        engine=cost.engine,
        finished=_now(),
        rows=cost.rows,
    )
    write_done(folder, done)
    if "workspace" not in plan.keep:  # not before: half a workspace would keep the run from going on
        for path in folder.glob(f"{WORK}*"):
            shutil.rmtree(path, ignore_errors=True)
    return done


class Watch:
    """Follows a run: rounds and seconds so far, peak memory of this process with all it started; written into
    progress.json, from which the next session of the run goes on to count."""

    def __init__(self, folder: Path, record: Path):
        self.folder, self.record = folder, record
        self.seconds, self.peak, self._rounds = 0.0, 0, (0.0, 0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Watch:
        earlier: dict[str, Any] = {}
        with suppress(UserError):
            earlier = read_json(self.folder / PROGRESS)
        self._before, self.peak = float(earlier.get("seconds", 0.0)), int(earlier.get("peak_memory_bytes", 0))
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _follow(self) -> None:
        parent = os.environ.get(PARENT)
        while not self._stop.wait(PACE):
            self._look()
            if parent is not None and str(os.getppid()) != parent:  # the runner was killed: nobody waits for this run
                os.kill(os.getpid(), signal.SIGTERM)
                return

    def _look(self) -> None:
        self.seconds = self._before + time.monotonic() - self._began
        self.peak = max(self.peak, tree_memory())
        state = {"seconds": round(self.seconds, 1), "peak_memory_bytes": self.peak, "pid": os.getpid()}
        with suppress(UserError, OSError):
            write_json(self.folder / PROGRESS, {**state, **self._rounds_done()})

    def _rounds_done(self) -> dict[str, int]:
        path = self.record / RUN
        with suppress(OSError, UserError, KeyError, TypeError, ValueError):
            changed = path.stat().st_mtime
            if changed != self._rounds[0]:
                run = read_json(path)
                self._rounds = (changed, len(run["rounds"]), int(run["training"]["rounds"]))
        return {"rounds_done": self._rounds[1], "rounds": self._rounds[2]}


def tree_memory() -> int:
    """Bytes of resident memory of this process and all below it; pages that they share count for each."""
    total = 0
    with suppress(psutil.Error):
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def is_held(path: Path) -> bool:
    """Whether another process holds the lock file `path`."""
    if not path.exists():
        return False
    with path.open("a", encoding="utf-8") as file:
        return not try_lock(file)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
