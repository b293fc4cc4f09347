"""The server's record of a job at a place of its own."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from heterosync.federation.modelfile import BEST_MODEL, LAST_MODEL
from heterosync.federation.results import CROSS_SITE, HISTORY, RUN, TENSORBOARD
from heterosync.files import explained, make_folder, read_json


def collect_results(server: Path, results: Path) -> Path:
    """Put the record in the job folder `server` at `results`, without FLARE's copies of job and logs; models as hard
    links. What was at `results` goes."""
    shutil.rmtree(results, ignore_errors=True)
    make_folder(results)
    with explained(results):
        for name in (HISTORY, CROSS_SITE, RUN, LAST_MODEL, BEST_MODEL):
            if (server / name).exists():
                _link(server / name, results / name)
        if (server / TENSORBOARD).is_dir():
            shutil.copytree(server / TENSORBOARD, results / TENSORBOARD)
    return results


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def status_of(results: Path) -> str:
    """What our own record says of a run: "completed", "failed: …", "stopped: …"; "" without a record."""
    path = results / RUN
    return str(read_json(path).get("status", "")) if path.exists() else ""
