"""Run one job folder in FLARE's simulator, with progress, one readable cause of failure, and no process left behind."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from heterosync.data.site import find_site_folder
from heterosync.errors import UserError
from heterosync.federation.results import RUN
from heterosync.federation.trainings import NOT_STORED, SEGMENT_DONE, SERVER, TRAININGS
from heterosync.federation.wire import is_site_name
from heterosync.files import explained, make_folder, new_folder, read_json, write_json, write_text
from heterosync.flare.jobs.allowlist import prepare_workspace
from heterosync.flare.jobs.folder import is_split, is_swarm
from heterosync.flare.jobs.segments import training_id_of
from heterosync.flare.running.collect import collect_results
from heterosync.flare.running.processes import ends_on_signal, package_environment
from heterosync.flare.running.simulator_process import Output, Simulator, log_config, watch

#: FLARE's name for the one job of a simulator workspace.
JOB_ID = "simulate_job"
PATIENCE = 120.0  # seconds of silence at the start before it counts as hung


@dataclass(frozen=True)
class SimulationResult:
    """How a simulation ended.

    status: "completed", "segment" (as many rounds as it should do; more are left), "failed", "timeout" or "hung".
    cause: "" or the lines that say what to mend. results: the server's record (history.csv, run.json, …). sites: site
    -> its folder of the run (audit.jsonl, heterosync/results/).
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
    resume: Path | str | None = None,
) -> SimulationResult:
    """Simulate `job` with `sites`, whose folders lie in `data`; what an earlier run left in `workspace` is replaced.

    threads: sites that run at once (default: all). timeout: seconds for all of it. retry: how often a start that hangs
    is tried again. log: gets one line per epoch and round. resume: the workspace of an earlier simulation, which may be
    `workspace` itself; `job` goes on with its training (a `segment_job` of the training `JOB_ID`). Raises
    `SimulationFailed` (a `UserError` with one readable cause) unless the job or its segment was completed, and
    `UserError` for wrong arguments before anything is started.
    """
    job, workspace, data = Path(job).absolute(), Path(workspace).absolute(), Path(data).absolute()
    sites = list(sites)
    threads = len(sites) if threads is None else threads
    _check(job, workspace, sites, data, threads)
    if bool(training_id_of(job)) != (resume is not None):
        raise UserError(f"{job}: a job that goes on with a training and `resume` belong together: use --resume")
    trainings = _trainings(workspace)
    if resume is not None:
        _carry_over(Path(resume).absolute(), trainings, sites)
    elif trainings.exists():
        with explained(trainings):
            shutil.rmtree(trainings)
    environment = _environment(data, threads, trainings if resume is not None else None)
    make_folder(workspace)
    prepare_workspace(workspace)
    config = write_json(workspace / "local" / "log_config.json", log_config())
    arguments = [str(job), "-w", str(workspace), "-c", ",".join(sites), "-t", str(threads), "-l", str(config)]
    say = log or (lambda line: None)
    deadline = time.monotonic() + timeout if timeout is not None else None
    for attempt in range(retry + 1):
        _forget(workspace)
        output = Output(say)
        with ends_on_signal():
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
    if result.status not in ("completed", "segment"):
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
    if threads < len(sites) and (is_swarm(job) or is_split(job)):  # their sites wait for each other
        raise UserError(f"threads is {threads}: this job needs one for each of its {len(sites)} sites")
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


def _trainings(workspace: Path) -> Path:
    """Where the participants of resumed simulations keep their training: beside the workspace, which FLARE empties."""
    return workspace.with_name(f"{workspace.name}.trainings")


def _carry_over(earlier: Path, trainings: Path, sites: list[str]) -> None:
    """Put what an earlier simulation stored of its training at `trainings`, all or nothing."""
    if earlier.name == "results":
        earlier = earlier.parent
    beside = _trainings(earlier)
    if beside == trainings and trainings.exists():
        return
    stored = {p: beside / p if beside.exists() else earlier / p / "trainings" for p in (SERVER, *sites)}
    if not (stored[SERVER] / JOB_ID / RUN).is_file():
        raise UserError(f"a training {NOT_STORED} in {earlier}: give the workspace of an earlier simulation")
    if trainings.exists():
        with explained(trainings):
            shutil.rmtree(trainings)
    with new_folder(trainings) as folder:
        for participant, source in stored.items():
            if (source / JOB_ID).is_dir():  # else a site that joins
                shutil.copytree(source / JOB_ID, folder / participant / JOB_ID)


def _environment(data: Path, threads: int, trainings: Path | None) -> dict[str, str]:
    """Ours, with the data, the package (also where it is not installed) and a fair share of the processor per site."""
    environment = package_environment()
    environment["HETEROSYNC_DATA"] = str(data)
    environment.pop(TRAININGS, None)
    if trainings is not None:
        environment[TRAININGS] = str(trainings)
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
    elif record.get("status") in ("completed", SEGMENT_DONE):
        status, cause = ("completed" if record["status"] == "completed" else "segment"), ""
    elif not cause:
        cause = f"the simulator ended with status '{record.get('status', 'not started')}': see {log}"
    folders = {site: workspace / site / JOB_ID for site in sites}
    return SimulationResult(status, cause, collect_results(server, workspace / "results"), folders, log)
