"""The demo: a synthetic alliance, HSL and local training under FLARE's simulator, one table and one figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from heterosync.files import own_folder, write_json
from heterosync.study.evidence.runs import read_runs
from heterosync.study.pages.report import score_table, summary, write_report

MARK = ".heterosync-demo"

#: Small enough for two processors in a few minutes, large enough that training alone is visibly worse.
TRAINING: dict[str, Any] = {
    "image_size": 64,
    "weights": "none",
    "rounds": 6,
    "local_epochs": 2,
    "batch_size": 32,
    "match_steps": 200,  # as long as the anchor set: local training makes as many steps as HSL
}
METHODS: dict[str, dict[str, Any]] = {"hsl": {}, "local": {"network": "classifier"}}

#: Runs one method: (method, method settings, training, data folder, sites, folder for its job and workspace) ->
#: results folder.
RunJob = Callable[[str, Mapping[str, Any], Mapping[str, Any], Path, list[str], Path], Path]


def run_demo(
    out: Path | str,
    run_job: RunJob,
    training: Mapping[str, Any] | None = None,
    scale: float = 1.0,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, float | None]]:
    """Make the alliance, train both methods, write table, figures and summary.json (method -> site -> AUC, and mean).

    `training` changes `TRAINING`; `scale` multiplies the number of images. Returns the summary.
    """
    from heterosync.data.synthetic import make_alliance

    start = time.monotonic()
    settings = {**TRAINING, **(training or {})}
    out = own_folder(out, MARK, "heterosync demo")
    say(f"making five synthetic sites with combined skew in {out / 'data'}")
    sites = make_alliance(out / "data", seed=0, image_size=settings["image_size"], scale=scale)
    results = []
    for method, method_settings in METHODS.items():
        pace = f"{settings['rounds']} rounds of {settings['local_epochs']} epochs"
        say(f"\n{method}: {pace} at {len(sites)} sites under nvflare simulator")
        results.append(run_job(method, method_settings, settings, out / "data", sites, out / method))
    runs = read_runs(results)
    means = summary(runs)
    write_json(out / "summary.json", means)
    files = write_report(runs, out)
    say(f"\nTest AUC per site (95 % interval) on synthetic images, after {time.monotonic() - start:.0f} s:\n")
    say(score_table(runs))
    say("\nOpen:")
    for path in [out / "summary.json", *files]:
        say(f"  {path}")
    return means
