"""How long a study will take: a training step of each method is timed once, the rest is counting."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from heterosync.study.layout import RunSpec
from heterosync.study.running.cells import Cell
from heterosync.study.running.plan import MethodEntry, digest_of
from heterosync.training.batches import Batch

#: Training settings that change how many items a run has, and not how long one takes.
COUNTS = ("seed", "rounds", "local_epochs", "match_steps", "balanced_sampler")
#: Images in the timed batch, and steps, of which the first warms up.
BATCH, STEPS = 8, 3
#: Validation, decoding, fusion and tests beside the training steps, as a share of these [own measurement].
BESIDE = 0.25
#: Seconds that a run takes beside its epochs: process, imports, FLARE's start.
START = {"inprocess": 5.0, "flare": 20.0}


def items_of(cell: Cell, entry: MethodEntry, spec: RunSpec) -> int:
    """Items (images, or pairs of them) that all local epochs of a run show, those of all sites together."""
    made = entry.made(spec.settings["training"])
    least = max(made.training.match_steps, cell.n_anchor if made.uses_anchor else 0)
    counts = [cell.images(site)[0] for site in cell.sites]
    if made.split:  # every site makes as many steps as the largest
        least = max(least, *counts)
    epoch = max(sum(counts), least) if made.pooled else sum(max(count, least) for count in counts)
    return epoch * made.training.rounds * made.training.local_epochs


def estimate(runs: Sequence[tuple[Cell, MethodEntry, RunSpec]], engine: str) -> list[float]:
    """Seconds of each run on this machine, as busy as it is now; right within a factor of about two."""
    known: dict[str, float] = {}
    found = []
    for cell, entry, spec in runs:
        training = {name: value for name, value in spec.settings["training"].items() if name not in COUNTS}
        key = digest_of([entry.method, entry.settings, training])
        if key not in known:
            known[key] = seconds_per_item(entry, training)
        found.append(items_of(cell, entry, spec) * known[key] * (1 + BESIDE) + START[engine])
    return found


def seconds_per_item(entry: MethodEntry, training: dict) -> float:
    """The fastest of a few training steps of a throw-away model, by the number of its items."""
    method = entry.made(training)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size, channels = method.training.image_size, method.training.channels
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = method.build_model(weights="none").to(device, memory_format=torch.channels_last).train()
        images = torch.rand(2, BATCH, channels, size, size, device=device)
        labels = (torch.arange(BATCH, device=device) % 2).float()
        batch = Batch(images[0], labels, *((images[1], labels) if method.uses_anchor else ()))
        best = float("inf")
        for step in range(STEPS):
            start = _now(device)
            method.loss(model, batch).backward()
            if step:
                best = min(best, _now(device) - start)
    return best / BATCH


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
