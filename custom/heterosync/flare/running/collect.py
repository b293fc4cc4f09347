"""The server's record of a job at a place of its own."""

from __future__ import annotations

from pathlib import Path

from heterosync.federation.modelfile import BEST_MODEL, LAST_MODEL
from heterosync.federation.results import CROSS_SITE, HISTORY, RUN, TENSORBOARD
from heterosync.files import copy_file, link_file, new_folder, read_json


def collect_results(server: Path, results: Path) -> Path:
    """Put the record in the job folder `server` at `results`, without FLARE's copies of job and logs; models as hard
    links. What was at `results` goes once all of it is there."""
    with new_folder(results, replace=True) as folder:
        for name in (HISTORY, CROSS_SITE, RUN, LAST_MODEL, BEST_MODEL):
            if (server / name).exists():
                link_file(server / name, folder / name)
        for path in (server / TENSORBOARD).glob("*"):
            copy_file(path, folder / TENSORBOARD / path.name)
    return results


def status_of(results: Path) -> str:
    """What our own record says of a run: "completed", "failed: …", "stopped: …"; "" without a record."""
    path = results / RUN
    return str(read_json(path).get("status", "")) if path.exists() else ""
