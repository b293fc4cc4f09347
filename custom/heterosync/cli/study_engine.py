"""FLARE's simulator as the engine of a study."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from heterosync.study.running.engines import Task, Trained


class Simulator:
    """One simulation per run, with a process for every site."""

    name = "flare"

    def record(self, work: Path) -> Path:
        """The folder with the run.json of a simulation that is going on."""
        from heterosync.flare.running.simulator import JOB_ID

        return work / "workspace" / "server" / JOB_ID

    def train(self, task: Task, say: Callable[[str], None]) -> Trained:
        """Simulate the job, or what an interrupted simulation left of it."""
        from heterosync.federation.modelfile import BEST_MODEL, LAST_MODEL, OWN_BEST
        from heterosync.federation.results import RUN
        from heterosync.federation.trainings import SERVER
        from heterosync.files import link_file
        from heterosync.flare.jobs.builder import JobOptions, build_job
        from heterosync.flare.jobs.segments import segment_job
        from heterosync.flare.running.collect import status_of
        from heterosync.flare.running.simulator import JOB_ID, simulate
        from heterosync.study.running.engines import Trained

        workspace = task.work / "workspace"
        beside = workspace.with_name(f"{workspace.name}.trainings")  # where a resumed simulation keeps its training
        if status_of(workspace / "results") != "completed":
            options = JobOptions(
                training=dict(task.training),
                method_settings=dict(task.settings),
                anchors_may_differ=task.anchors_may_differ,
                in_process=True,  # a trainer that dies ends the run, which goes on after its last round
            )
            stored = (beside / SERVER / JOB_ID, workspace / SERVER / "trainings" / JOB_ID)
            resume = workspace if any((folder / RUN).is_file() for folder in stored) else None
            with tempfile.TemporaryDirectory(prefix="heterosync-") as temporary:
                job = build_job(task.method, Path(temporary) / "job", options)
                if resume is not None:
                    say("goes on with an interrupted simulation")
                    job = segment_job(job, Path(temporary) / "segment", JOB_ID)
                simulate(job, workspace, list(task.sites), task.data, log=say, resume=resume)
        kept = {site: beside / site if beside.exists() else workspace / site / "trainings" for site in task.sites}
        own = {site: folder / JOB_ID / OWN_BEST for site, folder in kept.items()}
        results = {site: workspace / site / JOB_ID / "heterosync" / "results" for site in task.sites}
        for name in (LAST_MODEL, BEST_MODEL):  # a swarm's server has none, and its sites have the same
            at_sites = [file for site in task.sites if (file := workspace / site / JOB_ID / name).exists()]
            if at_sites and not (workspace / "results" / name).exists():
                link_file(at_sites[0], workspace / "results" / name)
        return Trained(
            workspace / "results",
            {site: folder / "predictions.csv" for site, folder in results.items()},
            {site: path for site, path in own.items() if path.exists()},
        )
