"""How long a study will take: a training step of each method is timed once, the rest is counting."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from heterosync.study.layout import RunSpec
from heterosync.study.running.kinds import AnyCell
from heterosync.study.running.plan import MethodEntry, digest_of

#: Training settings that change how many items a run has, and not how long one takes.
COUNTS = ("seed", "fold", "rounds", "local_epochs", "crops", "match_steps", "balanced_sampler")
#: Timed steps, of which the first warms up.
STEPS = 3
#: Seconds that a run takes beside its epochs: process, imports, FLARE's start.
START = {"inprocess": 5.0, "flare": 20.0}


def estimate(runs: Sequence[tuple[AnyCell, MethodEntry, RunSpec]], engine: str, timed: int) -> list[float]:
    """Seconds of each run on this machine, as busy as it is now; right within a factor of about two. timed: items in
    the batch that is timed."""
    known: dict[str, float] = {}
    found = []
    for cell, entry, spec in runs:
        training = {name: value for name, value in spec.settings["training"].items() if name not in COUNTS}
        key = digest_of([entry.method, entry.settings, training])
        if key not in known:
            known[key] = seconds_per_item(entry, training, timed)
        found.append(cell.items(entry, spec) * known[key] + START[engine])
    return found


def seconds_per_item(entry: MethodEntry, training: dict, timed: int) -> float:
    """The fastest of a few training steps of a throw-away model, by the number of its items."""
    method = entry.made(training)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = method.build_model(weights="none").to(device, memory_format=method.task.layout).train()
        batch = method.task.random_batch(method, timed, device)
        best = float("inf")
        for step in range(STEPS):
            start = _now(device)
            method.loss(model, batch).backward()
            if step:
                best = min(best, _now(device) - start)
    return best / timed


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def in_words(seconds: float) -> str:
    """`40 s`, `25 min`, `3.5 h`, `4 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
