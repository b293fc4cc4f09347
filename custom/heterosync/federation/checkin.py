"""What the sites say of themselves before round 0, and whether they fit together."""

from __future__ import annotations

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache
from importlib import metadata
from typing import Any

from torch import nn

from heterosync import __version__


@cache
def versions() -> Mapping[str, str]:
    """Versions of what computes here: this package, Python, torch, torchvision and, where installed, monai, nvflare."""
    found = {"heterosync": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("torch", "torchvision", "monai", "nvflare"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def model_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and types of the model's state: equal where the same model was built."""
    parts = [f"{name} {tuple(value.shape)} {value.dtype}" for name, value in model.state_dict().items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def receivers(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sites that have no training data: where all end with one model, they take part by receiving and testing it."""
    return sorted(site for site, report in reports.items() if dict(report.get("counts", {})).get("train") == 0)


def compare(
    reports: Mapping[str, Mapping[str, Any]],
    anchors_may_differ: bool = False,
    min_sites: int = 2,
    receiving: Collection[str] = (),
) -> list[str]:
    """Problems that forbid to start, one line each, naming the sites that differ from the majority; [] if none.

    min_sites: sites needed that train; those in `receiving` do not count.
    Compared: method, version of heterosync, model hash, first weights (where sites make them), label names, and the
    anchor digest unless `anchors_may_differ` (the ablation of the anchor task). Versions of torch may differ between
    hospitals; they are recorded, not compared.
    """
    problems = []
    training = sorted(set(reports) - set(receiving))
    if len(training) < min_sites:
        present, who = ", ".join(training) or "none", "with training data " if receiving else ""
        problems.append(f"{len(training)} site(s) {who}checked in ({present}), at least {min_sites} are needed")
    checks = [
        ("method", "method", "start all sites with the same job"),
        ("version of heterosync", "versions", "install the same version at every site"),
        ("model", "model_hash", "install the same version at every site"),
        (
            "start",
            "initial_weights",
            "put the same weights file at every site, or set training setting 'weights' to none",
        ),
        ("label names", "labels", "write the same 'labels' into every site.yaml, the negative one first"),
    ]
    if not anchors_may_differ:
        checks.append(("anchor digest", "anchor_digest", "give every site the same copy of the anchor pack"))
    for what, field, remedy in checks:
        values = {site: _comparable(field, report.get(field)) for site, report in sorted(reports.items())}
        problems.extend(_differences(what, values, remedy))
    return problems


def _comparable(field: str, value: Any) -> str:
    if field == "versions":
        return str(dict(value or {}).get("heterosync", "unknown"))
    if field == "labels":
        return " / ".join(map(str, value or []))
    return str(value) if value else "none"


def _short(text: str) -> str:
    return re.sub(r"([0-9a-f]{12})[0-9a-f]{52}$", r"\1…", text)


def _differences(what: str, values: Mapping[str, str], remedy: str) -> list[str]:
    counts = Counter(values.values())
    if len(counts) < 2:
        return []
    (common, most), (_, second) = counts.most_common(2)
    if most == second:  # no majority: nobody can say who is right
        each = "; ".join(f"{site} has {_short(value)}" for site, value in values.items())
        return [f"the {what} differs between sites: {each}: {remedy}"]
    return [
        f"site {site}: its {what} is {_short(value)}, {most} of {len(values)} sites have {_short(common)}: {remedy}"
        for site, value in values.items()
        if value != common
    ]
