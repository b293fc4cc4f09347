"""(b) Simulator: wall time of a job under FLARE's simulator against the same epochs in one plain loop.

The plain loop is the in-process runner: the same sites one after the other in this process, without FLARE. Both give
the same tensors; the difference is what processes, messages and waiting cost. The fixed start of the simulator
(several imports of torch) is part of it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.table import Measurement


def run(quick: bool = False) -> list[Measurement]:
    from heterosync.data.synthetic import make_alliance
    from heterosync.federation.runner import run_inprocess
    from heterosync.flare.jobs.builder import build_job
    from heterosync.flare.jobs.options import JobOptions
    from heterosync.flare.running.simulator import simulate

    training: dict[str, Any] = {"image_size": 64, "weights": "none", "rounds": 4, "local_epochs": 5, "batch_size": 32}
    scale = 1.0
    if quick:
        training |= {
            "image_size": 32,
            "backbone": "resnet_tiny",
            "rounds": 1,
            "local_epochs": 1,
            "precision": "float32",
        }
        scale = 0.1
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        sites = make_alliance(root / "data", image_size=training["image_size"], scale=scale)
        start = time.perf_counter()
        run_inprocess("hsl", {site: root / "data" / site for site in sites}, root / "plain", training=training)
        plain = time.perf_counter() - start
        job = build_job("hsl", root / "job", JobOptions(training=training))
        start = time.perf_counter()
        workspace = root / "workspace"
        result = simulate(job, workspace, sites, root / "data", threads=len(sites), timeout=3600, log=None)
        simulated = time.perf_counter() - start
        rounds = [_round_seconds(folder) for folder in (result.results, root / "plain")]
    what = f"{len(sites)} sites, {training['rounds']} x {training['local_epochs']} epochs, {training['image_size']} px"
    note = f"{os.cpu_count()} processors; ours: simulator, other: plain loop"
    return [
        Measurement("simulation", f"{what}, all", "s", simulated, plain, plain / simulated, ">= 0.91", note),
        Measurement("simulation", f"{what}, rounds only", "s", *rounds, rounds[1] / rounds[0], ">= 0.91", note),
    ]


def _round_seconds(folder: Path) -> float:
    return sum(record["seconds"] for record in json.loads((folder / "run.json").read_text())["rounds"])
