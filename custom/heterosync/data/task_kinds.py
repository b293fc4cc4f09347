"""What a site folder can be, by the `task` in its site.yaml, and how each kind is checked.

To add a kind: a function that checks such a folder, a line in `CHECKS`, and its name in site_yaml.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heterosync.data.site_yaml import VOLUMES, read_task


@dataclass(frozen=True)
class Report:
    """What a check found: one line per problem, the `device` that site.yaml names, and, where nothing is wrong, a
    `summary` for programs and the same in `lines`."""

    problems: list[str]
    device: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def check_folder(folder: Path, need_anchor: bool = True) -> Report:
    """Check a site folder of whatever kind; `need_anchor` counts where a kind knows anchor tasks."""
    return CHECKS.get(read_task(folder), _check_images)(folder, need_anchor)


def _check_images(folder: Path, need_anchor: bool) -> Report:
    from heterosync.data.check import inspect_site
    from heterosync.data.site import SPLITS

    found = inspect_site(folder, None, need_anchor=need_anchor)
    device = found.config.device if found.config else None
    if found.problems or found.config is None:
        return Report(found.problems, device)
    labels = [found.config.labels[row.label] for row in found.rows]
    counts = Counter(zip(found.splits, labels, strict=True))
    images = {split: {name: counts[split, name] for name in found.config.labels} for split in SPLITS}
    digest = found.anchor.digest if found.anchor else None
    lines = [
        f"{split:10}  " + ", ".join(f"{count} {name}" for name, count in by_label.items())
        for split, by_label in images.items()
    ]
    return Report([], device, {"images": images, "anchor_digest": digest}, [*lines, f"anchor      {digest or 'none'}"])


def _check_volumes(folder: Path, _: bool) -> Report:
    from heterosync.data.volume_check import inspect_volumes

    found = inspect_volumes(folder)
    device = found.config.device if found.config else None
    if found.problems or found.config is None:
        return Report(found.problems, device)
    held = Counter(found.places)
    cases = {"test": held[0], **{f"fold {fold}": held[fold] for fold in range(1, found.config.folds + 1) if held[fold]}}
    spacings = Counter(" x ".join(f"{step:.3g}" for step in facts.spacing) for facts in found.facts)
    orientations = Counter(facts.orientation for facts in found.facts)
    organs = sorted(facts.organ_ml for facts in found.facts)
    summary = {"cases": cases, "spacings": dict(spacings), "orientations": dict(orientations), "organ_ml": organs}
    lines = [
        f"cases        {len(found.rows)}: " + ", ".join(f"{count} {name}" for name, count in cases.items()),
        "spacing      " + ", ".join(f"{spacing} mm ({count})" for spacing, count in spacings.most_common()),
        "orientation  " + ", ".join(f"{name} ({count})" for name, count in orientations.most_common()),
        f"organ        {organs[0]:.3g} to {organs[-1]:.3g} ml",
    ]
    return Report([], device, summary, lines)


CHECKS: dict[str, Callable[[Path, bool], Report]] = {VOLUMES: _check_volumes}
