"""float32 or bfloat16 autocast: what a device does faster is measured, not guessed."""

from __future__ import annotations

import time

import torch
from torch import nn

from heterosync.errors import UserError, nearest
from heterosync.training.batches import Batch
from heterosync.training.learner import Learner
from heterosync.training.task import TaskLearner

PRECISIONS = ("float32", "bfloat16")
#: bfloat16 must save at least this share of a step's time to be chosen
GAIN = 0.1
#: seconds after which no further pair of steps is measured
BUDGET = 0.8


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that training and scoring run in."""
    if precision not in PRECISIONS:
        raise UserError(f"precision is '{precision}': {nearest(precision, PRECISIONS)}")
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 may pay on this device: a GPU that computes it, or a CPU with AMX tiles.

    AVX512-BF16 alone was as fast as float32, so that only the noise of the measurement would have chosen.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return False


def choose_precision(
    learner: TaskLearner, device: str | torch.device = "cpu", steps: int = 4
) -> tuple[str, dict[str, float]]:
    """The faster precision for this method on this device, and the measured seconds per step of each.

    Runs up to `steps` training steps of each in turn, on a throw-away model with random images, and compares the
    fastest: what else the machine does meets both alike. Random generators and any other model stay as they are.
    Where bfloat16 cannot pay the answer is "float32" at once, without a measurement ({}).
    """
    device = torch.device(device)
    if learner.training.precision != "auto":
        return learner.training.precision, {}
    if not has_fast_bfloat16(device):
        return "float32", {}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        timings = _measure(learner, device, steps)
    faster = timings["bfloat16"] < (1 - GAIN) * timings["float32"]
    return ("bfloat16" if faster else "float32"), timings


def _measure(learner: TaskLearner, device: torch.device, steps: int) -> dict[str, float]:
    size = min(learner.training.batch_size, 8) if device.type != "cuda" else learner.training.batch_size
    model = learner.build_model(weights="none").to(device, memory_format=learner.task.layout).train()
    batch = learner.task.random_batch(learner, size, device)
    best = dict.fromkeys(PRECISIONS, float("inf"))
    began = time.perf_counter()
    for step in range(steps + 1):
        for precision in PRECISIONS:
            seconds = _step_seconds(learner, model, batch, device, precision)
            if step:  # the first one warms up
                best[precision] = min(best[precision], seconds)
        if step and time.perf_counter() - began > BUDGET:
            break
    return best


def _step_seconds(learner: Learner, model: nn.Module, batch: Batch, device: torch.device, precision: str) -> float:
    start = _now(device)
    model.zero_grad(set_to_none=True)
    with autocast(device, precision):
        loss = learner.loss(model, batch)
    loss.backward()
    return _now(device) - start


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
