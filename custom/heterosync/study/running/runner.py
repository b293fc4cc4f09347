"""The study runner: lays out a plan and carries out its runs, each in a process of its own, and none of them twice."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

import heterosync
from heterosync.errors import ProblemList, UserError
from heterosync.files import explained, held, make_folder, read_json
from heterosync.study.layout import FAILED, LOG, PROGRESS, RunSpec, read_done, write_spec
from heterosync.study.running.estimate import estimate, in_words
from heterosync.study.running.kinds import KINDS, AnyCell, AnyData
from heterosync.study.running.one import PARENT, note_failure
from heterosync.study.running.plan import AnyPlan, MethodEntry
from heterosync.study.running.progress import Display
from heterosync.study.running.record import check_same, write_study
from heterosync.study.table import text_table

#: Seconds between two looks at the runs in progress, and those that a run has to end by itself when it is stopped.
PACE, PATIENCE = 0.25, 20.0


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Machine:
    """What a study may use. start: the command that carries out one run, without study and run; jobs: runs at once;
    cores: processors for all of them together (None: all, unless OMP_NUM_THREADS says how many threads a run has);
    gpus: their numbers, shared out among the jobs; () leaves that to torch."""

    start: Sequence[str]
    jobs: int = 1
    cores: int | None = None
    gpus: Sequence[str] = ()

    def environment(self, slot: int, processes: int) -> dict[str, str]:
        """Of the run in place `slot`, whose training is spread over `processes` processes."""
        root = str(Path(heterosync.__file__).resolve().parents[1])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        threads = str(max(1, (self.cores or processors()) // self.jobs // processes))
        found = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), PARENT: str(os.getpid())}
        if self.cores is not None:
            found["OMP_NUM_THREADS"] = threads
        found.setdefault("OMP_NUM_THREADS", threads)
        if self.gpus:
            found["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        return found


@dataclass(frozen=True)
class Work:
    """A plan laid out: all runs, and the seconds that each will take."""

    data: AnyData
    runs: Sequence[tuple[AnyCell, MethodEntry, RunSpec]]
    seconds: list[float] = field(default_factory=list)

    @property
    def specs(self) -> list[RunSpec]:
        return [spec for _, _, spec in self.runs]


def lay_out(plan: AnyPlan, out: Path) -> Work:
    """Everything that can be known before anything is written. Raises `ProblemList` with all that keeps the plan from
    being carried out in `out`."""
    data = KINDS[plan.task].data(plan)
    work = Work(data, data.runs())
    problems = []
    for cell, entry, spec in work.runs:
        made = entry.made(spec.settings["training"])
        if len(cell.sites) < made.min_sites:
            problems.append(f"scenario {cell.scenario} has {len(cell.sites)} site, and method {spec.label} needs two")
    if not work.runs:
        problems.append(f"plan {plan.name} has no run: no scenario has a method")
    problems += data.problems(out)
    if problems:  # the plan's own come before what stands in `out`: another --out would not mend them
        raise ProblemList(list(dict.fromkeys(problems)))
    check_same(out, plan, work.specs)
    for cell in data.cells:
        data.is_written(cell, out)
    return Work(data, work.runs, estimate(work.runs, plan.engine, data.timed))


def is_done(spec: RunSpec, out: Path) -> bool:
    done = read_done(spec.folder(out))
    return done is not None and done.digest == spec.digest


def plan_text(work: Work, out: Path, machine: Machine) -> str:
    """The plan for a person: what will be run on which images, and how long it takes."""
    plan = work.data.plan
    left = [i for i, spec in enumerate(work.specs) if not is_done(spec, out)]
    seconds = sum(work.seconds[i] for i in left)
    labels = ", ".join(dict.fromkeys(spec.label for spec in work.specs))
    done = f", {len(work.specs) - len(left)} of them done" if len(left) < len(work.specs) else ""
    cores = machine.cores or processors()
    jobs = f", {machine.jobs} at a time on {cores} processors" if machine.jobs > 1 else ""
    lines = [
        f"study {plan.name}: {len(work.specs)} runs{done}, engine {plan.engine}{jobs}, in {out}",
        f"methods: {labels}",
        f"repeats: {len(plan.seeds)} (seeds {', '.join(map(str, plan.seeds))})",
        "",
        text_table(*work.data.overview()),
        "",
        f"time: about {in_words(seconds)} on this machine, as busy as it is now",
    ]
    return "\n".join(lines)


def plan_facts(work: Work, out: Path) -> dict[str, Any]:
    """The plan for a program."""
    runs = [
        {"run": spec.name, "path": spec.path, "seconds": round(seconds), "done": is_done(spec, out)}
        for spec, seconds in zip(work.specs, work.seconds, strict=True)
    ]
    sites = {cell.name: {site: cell.images(site) for site in cell.sites} for cell in work.data.cells}
    return {"study": str(out), "name": work.data.plan.name, "runs": runs, "sites": sites}


def prepare(work: Work, out: Path, show: Display) -> list[int]:
    """Write study.json, and for every run that is not done its images and run_spec.json. Returns the numbers of these
    runs in `work`."""
    write_study(out, work.data.plan, work.specs, work.data.cells)
    todo = [i for i, spec in enumerate(work.specs) if not is_done(spec, out)]
    needed = {cell.folder(out): cell for cell in (work.runs[i][0] for i in todo)}
    for number, (folder, cell) in enumerate(needed.items(), 1):
        show.event("data", f"images {number} of {len(needed)}: {cell.name}", folder=str(folder))
        work.data.write(cell, out)
    for i in todo:
        write_spec(work.specs[i].folder(out), work.specs[i])
    return todo


def run_study(work: Work, out: Path, machine: Machine, show: Display, data_only: bool = False) -> dict[str, str]:
    """Write the data, then carry out every run that is not done. Returns run -> cause of those that failed.

    Stopped at any moment and called again it goes on: a run in progress after its last finished round.
    """
    with held(make_folder(out) / ".lock", f"{out}: the study is being run by another process: wait for its end"):
        todo = prepare(work, out, show)
        return {} if data_only else _Pool(work, out, machine, show, todo).play()


class _Pool:
    """The runs in progress, at most `machine.jobs`, and those to come."""

    def __init__(self, work: Work, out: Path, machine: Machine, show: Display, todo: list[int]):
        self.work, self.out, self.machine, self.show = work, out, machine, show
        self.todo, self.total = list(todo), len(todo)
        self.running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}  # slot -> (run, process)
        self.failed: dict[str, str] = {}
        self.spent = self.expected = 0.0  # seconds of the runs that ended, and those that were foreseen for them

    def play(self) -> dict[str, str]:
        try:
            while self.todo or self.running:
                for slot in range(self.machine.jobs):
                    if slot in self.running and self.running[slot][1].poll() is not None:
                        self._ended(*self.running.pop(slot))
                    run = None if slot in self.running else self._next()
                    if run is not None:
                        self.todo.remove(run)
                        self.running[slot] = self._start(run, slot)
                self._tell()
                time.sleep(PACE)
        finally:
            self.show.close()
            stop_all([process for _, process in self.running.values()])
        return self.failed

    def _next(self) -> int | None:
        """The first run to come that waits for none in progress or to come."""
        specs = self.work.specs
        pending = {specs[i].path for i in [*self.todo, *(run for run, _ in self.running.values())]}
        return next((i for i in self.todo if not self.work.data.waits_for(specs[i]) & pending), None)

    def _start(self, run: int, slot: int) -> tuple[int, subprocess.Popen[bytes]]:
        cell, entry, spec = self.work.runs[run]
        plan, folder = self.work.data.plan, spec.folder(self.out)
        processes = len(cell.sites) if plan.engine == "flare" and not entry.made({}).pooled else 1
        (folder / FAILED).unlink(missing_ok=True)
        self.show.event("start", f"{spec.name}: started", run=spec.name, folder=str(folder))
        command = [*self.machine.start, str(self.out), spec.path]
        with explained(folder / LOG), (folder / LOG).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.machine.environment(slot, processes),
                start_new_session=True,  # Ctrl-C is ours to pass on, in order
            )
        return run, process

    def _ended(self, run: int, process: subprocess.Popen[bytes]) -> None:
        spec = self.work.specs[run]
        folder = spec.folder(self.out)
        count = f"{self.total - len(self.todo) - len(self.running)} of {self.total}"
        if process.returncode == 0 and is_done(spec, self.out):
            done = read_done(folder)
            assert done is not None
            self.spent, self.expected = self.spent + done.seconds, self.expected + self.work.seconds[run]
            text = f"{spec.name}: done in {in_words(done.seconds)}, {done.peak_memory_bytes / 2**30:.1f} GiB ({count})"
            self.show.event("done", text, run=spec.name, seconds=done.seconds, peak_memory_bytes=done.peak_memory_bytes)
            return
        if not (folder / FAILED).exists():
            note_failure(folder, _how(process.returncode, folder / LOG))
        self.failed[spec.name] = str(read_json(folder / FAILED)["cause"])
        text = f"{spec.name}: FAILED: {self.failed[spec.name]} ({count})"
        self.show.event("failed", text, run=spec.name, cause=self.failed[spec.name])

    def _tell(self) -> None:
        states = []
        left = sum(self.work.seconds[i] for i in self.todo)
        for run, _ in self.running.values():
            state = progress_of(self.work.specs[run], self.out)
            share = state["rounds_done"] / state["rounds"] if state["rounds"] else 0.0
            left += (1 - share) * self.work.seconds[run]
            states.append(state)
        pace = self.spent / self.expected if self.expected else 1.0
        ended = self.total - len(self.todo) - len(self.running)
        self.show.state(f"{ended} of {self.total} runs, about {in_words(left * pace / self._at_once())} left", states)

    def _at_once(self) -> int:
        """How many runs the measured pace counts as parallel: their own seconds already show that they share."""
        return max(1, len(self.running)) if self.expected else 1


def progress_of(spec: RunSpec, out: Path) -> dict[str, Any]:
    """How far a run that is not done has come."""
    values: dict[str, Any] = {}
    with suppress(UserError):
        values = read_json(spec.folder(out) / PROGRESS)
    known = {"rounds_done": 0, "rounds": 0, "seconds": 0.0, "peak_memory_bytes": 0}
    return {"run": spec.name, **{name: values.get(name, default) for name, default in known.items()}}


def stop_all(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End runs the orderly way, and after `PATIENCE` seconds any way; none of what they started is left."""
    trees: list[psutil.Process] = []
    for process in processes:
        with suppress(psutil.Error):
            trees += psutil.Process(process.pid).children(recursive=True)
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, deadline - time.monotonic()))
        process.kill()
        process.wait()
    for child in trees:
        with suppress(psutil.Error):  # psutil compares the start time: a recycled process id is safe
            child.kill()


def _how(code: int, log: Path) -> str:
    if code == -signal.SIGKILL:
        return f"the run was killed: the machine was probably out of memory; fewer --jobs may help (log: {log})"
    if code < 0:
        return f"the run was ended by signal {-code} (log: {log})"
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if log.exists() else []
    return f"the run ended with exit code {code}: {''.join(last).strip()[:200]} (log: {log})"
