"""What a measurement returns, how a table of them looks, and the line that says on what machine it was taken."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from heterosync import __version__
from heterosync.files import write_text
from heterosync.study.table import text_table


@dataclass(frozen=True)
class Measurement:
    """`ours` against `other` in `unit`; `ratio` is written so that larger is better for us, `goal` as it was set
    before measuring."""

    part: str
    what: str
    unit: str
    ours: float
    other: float
    ratio: float
    goal: str = ""
    note: str = ""


def machine() -> dict[str, Any]:
    name = platform.processor()
    try:
        models = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    except OSError:
        pass
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "processor": name,
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "heterosync": __version__,
    }


def as_text(measurements: Sequence[Measurement]) -> str:
    rows = [
        [m.part, m.what, f"{m.ours:.4g}", f"{m.other:.4g}", m.unit, f"{m.ratio:.2f}", m.goal or "-", m.note or "-"]
        for m in measurements
    ]
    table = text_table(["part", "what", "ours", "other", "unit", "ratio", "goal", "note"], rows)
    return table + "\n\nmachine: " + ", ".join(f"{key} {value}" for key, value in machine().items())


def save(measurements: Sequence[Measurement], path: Path) -> None:
    """As JSON when the name ends so, else as the text table."""
    if path.suffix == ".json":
        write_text(
            path, json.dumps({"machine": machine(), "measurements": [asdict(m) for m in measurements]}, indent=2) + "\n"
        )
    else:
        write_text(path, as_text(measurements) + "\n")
