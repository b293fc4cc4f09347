"""A small study on volumes: two sites and a challenge set, two folds, a tiny U-Net."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import yaml

from heterosync.study.running.plan_file import read_plan
from heterosync.study.running.progress import Lines
from heterosync.study.running.runner import Work, lay_out, prepare
from segment_toys import TINY, toy_volume_site

METHODS = ("prostate_ahnet", "prostate_private")


def toy_sites(folder: Path, cases: int = 5) -> None:
    """Site folders below `folder` whose folds are yet to be drawn, and a challenge set."""
    for number, site in enumerate(("north", "south")):
        toy_volume_site(folder / site, cases, seed=number, contrast=3.0 - 4.0 * number)
        rewrite(folder / site, lambda image, mask: f"{image},{mask}", "image,mask")
    toy_volume_site(folder / "outside", 3, seed=7)
    rewrite(folder / "outside", lambda image, mask: f"{image},{mask},test", "image,mask,split")


def rewrite(site: Path, row: Callable[[str, str], str], header: str) -> None:
    """Make the manifest anew, case by case of its image and mask."""
    cases = [line.split(",")[:2] for line in (site / "manifest.csv").read_text().splitlines()[1:]]
    (site / "manifest.csv").write_text("\n".join([header, *(row(*case) for case in cases)]) + "\n")


def volume_plan(folder: Path, **changes) -> Path:
    """A plan file beside its site folders; None takes a key out."""
    folder.mkdir(parents=True, exist_ok=True)
    base = {
        "name": "toy",
        "task": "segmentation",
        "engine": "inprocess",
        "source": {"sites": {"north": "north", "south": "south"}, "challenge": "outside"},
        "folds": 2,
        "methods": list(METHODS),
        "training": {**TINY, "rounds": 1, "crops": 4},
    }
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in {**base, **changes}.items() if value is not None}))
    return path


def laid_out(folder: Path, **changes) -> tuple[Work, Path]:
    """The study folder of a plan, with data and run_spec.json as before the first run."""
    if not (folder / "north").exists():
        toy_sites(folder)
    work = lay_out(read_plan(volume_plan(folder, **changes)), folder / "study")
    prepare(work, folder / "study", Lines(io.StringIO()))
    return work, folder / "study"
