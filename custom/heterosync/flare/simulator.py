"""Run one job folder in FLARE's simulator, with progress, one readable cause of failure, and no process left behind."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import heterosync
from heterosync.data.site import find_site_folder
from heterosync.errors import UserError
from heterosync.federation.results import RUN
from heterosync.federation.wire import is_site_name
from heterosync.files import explained, make_folder, read_json, write_json, write_text
from heterosync.flare.allowlist import prepare_workspace
from heterosync.flare.simulator_process import Output, Simulator, log_config, watch

#: FLARE's name for the one job of a simulator workspace.
JOB_ID = "simulate_job"
PATIENCE = 120.0  # seconds of silence at the start before it counts as hung


@dataclass(frozen=True)
class SimulationResult:
    """How a simulation ended.

    status: "completed", "failed", "timeout" or "hung". cause: "" or the lines that say what to mend. results: the
    server's record (history.csv, run.json, …). sites: site -> its folder of the run (audit.jsonl, heterosync/results/).
    """

    status: str
    cause: str
    results: Path
    sites: dict[str, Path]
    log: Path


class SimulationFailed(UserError):
    """The simulation did not finish; `result` says how far it came."""

    def __init__(self, result: SimulationResult):
        super().__init__(result.cause)
        self.result = result


def simulate(
    job: Path | str,
    workspace: Path | str,
    sites: Sequence[str],
    data: Path | str,
    threads: int | None = None,
    timeout: float | None = None,
    retry: int = 1,
    log: Callable[[str], None] | None = print,
    patience: float = PATIENCE,
) -> SimulationResult:
    """Simulate `job` with `sites`, whose folders lie in `data`; what an earlier run left in `workspace` is replaced.

    threads: sites that run at once (default: all). timeout: seconds for all of it. retry: how often a start that hangs
    is tried again. log: gets one line per epoch and round. Raises `SimulationFailed` (a `UserError` with one readable
    cause) unless the job completed, and `UserError` for wrong arguments before anything is started.
    """
    job, workspace, data = Path(job).absolute(), Path(workspace).absolute(), Path(data).absolute()
    sites = list(sites)
    threads = len(sites) if threads is None else threads
    _check(job, workspace, sites, data, threads)
    environment = _environment(data, threads)
    make_folder(workspace)
    prepare_workspace(workspace)
    config = write_json(workspace / "local" / "log_config.json", log_config())
    arguments = [str(job), "-w", str(workspace), "-c", ",".join(sites), "-t", str(threads), "-l", str(config)]
    say = log or (lambda line: None)
    deadline = time.monotonic() + timeout if timeout is not None else None
    for attempt in range(retry + 1):
        _forget(workspace)
        output = Output(say)
        with _ends_on_signal():
            simulator = Simulator(arguments, environment, workspace.parent)
            try:
                end = watch(simulator, output, sites_at_once=threads, patience=patience, deadline=deadline)
            finally:
                simulator.stop()
                _keep_log(workspace, output)
        if end != "hung" or attempt == retry:
            break
        say(f"the simulator did not start within {patience:.0f} s of silence: starting it again")
    result = _result(workspace, sites, end, output, timeout)
    if result.status != "completed":
        raise SimulationFailed(result)
    return result


def _check(job: Path, workspace: Path, sites: list[str], data: Path, threads: int) -> None:
    if not (job / "meta.json").is_file():
        raise UserError(f"{job} is not a job folder (no meta.json): write one with `heterosync job export`")
    if not data.is_dir():
        raise UserError(f"data folder {data} does not exist: make one with `heterosync data scenario`")
    if not sites:
        raise UserError("no sites to simulate: name at least one")
    for site in sites:
        if not is_site_name(site):
            raise UserError(f"'{site}' cannot be the name of a site: use letters, digits, '-', '_' and '.'")
        find_site_folder(site, None, {"HETEROSYNC_DATA": str(data)})
    if len(set(sites)) != len(sites):
        raise UserError("a site is named twice")
    if not 1 <= threads <= len(sites):
        raise UserError(f"threads is {threads}: it must be between 1 and the number of sites, {len(sites)}")
    if any(letter.isspace() for letter in str(workspace)):
        raise UserError(f"workspace {workspace}: FLARE's simulator cannot work in a path with spaces: choose another")
    for folder, what in ((job, "job"), (data, "data")):
        if folder == workspace or workspace in folder.parents:
            raise UserError(f"the {what} folder {folder} lies in the workspace, which is emptied: choose another one")
    known = {"local", "startup", "simulator.log", "pool_stats", *sites}
    if (workspace / "server" / JOB_ID).is_dir():  # what FLARE's plain command leaves in a bare workspace
        known.add("server")
    strange = sorted(p.name for p in workspace.iterdir() if p.name not in known) if workspace.is_dir() else []
    if strange and not (workspace / "local" / "resources.json").exists():
        raise UserError(f"workspace {workspace} holds '{strange[0]}' and would be emptied: choose a new folder")


def _environment(data: Path, threads: int) -> dict[str, str]:
    """Ours, with the data, the package (also where it is not installed) and a fair share of the processor per site."""
    environment = dict(os.environ)
    root = str(Path(heterosync.__file__).resolve().parents[1])
    paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    environment["HETEROSYNC_DATA"] = str(data)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // threads)))
    return environment


def _forget(workspace: Path) -> None:
    """Remove the server's record of an earlier run (`_check` has made sure that the workspace is ours), so that its
    "completed" can never be taken for this run's."""
    for folder in (workspace / "server", workspace / "results"):
        with explained(folder):
            if folder.exists():
                shutil.rmtree(folder)


def _keep_log(workspace: Path, output: Output) -> None:
    write_text(workspace / "simulator.log", "\n".join(output.lines) + "\n")


def _result(workspace: Path, sites: list[str], end: str, output: Output, timeout: float | None) -> SimulationResult:
    server = workspace / "server" / JOB_ID
    log = workspace / "simulator.log"
    record = read_json(server / RUN) if (server / RUN).exists() else {}
    status, cause = "failed", output.cause()
    if end in ("hung", "timeout"):
        status = end
        waited = f"not finished within {timeout:g} s" if end == "timeout" else "the simulator hung at its start"
        cause = f"{waited}{': ' + cause if cause else ''}: see {log}"
    elif record.get("status") == "completed":
        status, cause = "completed", ""
    elif not cause:
        cause = f"the simulator ended with status '{record.get('status', 'not started')}': see {log}"
    folders = {site: workspace / site / JOB_ID for site in sites}
    return SimulationResult(status, cause, _copy_results(server, workspace / "results"), folders, log)


def _copy_results(server: Path, results: Path) -> Path:
    """The server's record at a place of its own: without FLARE's copies of job and logs; models as hard links."""
    shutil.rmtree(results, ignore_errors=True)
    make_folder(results)
    names = ("history.csv", "cross_site_metrics.json", RUN, "last_model.pt", "best_model.pt")
    with explained(results):
        for name in names:
            if (server / name).exists():
                _link(server / name, results / name)
        if (server / "tensorboard").is_dir():
            shutil.copytree(server / "tensorboard", results / "tensorboard")
    return results


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


@contextmanager
def _ends_on_signal() -> Iterator[None]:
    """Let SIGTERM end this process the orderly way, as Ctrl-C does, so that the simulator is stopped with it."""
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
