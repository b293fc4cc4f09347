"""(c) Aggregator: time and peak memory for 5 and 50 contributions, against FLARE's in-time weighted aggregator.

Both sides are FLARE aggregators that get `Shareable`s with a DXO and give one back.

Every case runs in a process of its own, so that its peak of resident memory is its own. The contributions are made
one at a time, outside the clock; the baseline is the memory before the first one is made, so the contribution that
has just arrived counts on both sides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import heterosync
from benchmarks.table import Measurement

MIB = 1024**2


def _state(seed: int, megabytes: int) -> dict[str, np.ndarray]:
    """A model-like state: 64 float32 tensors, one of them small, and an integer counter."""
    rng = np.random.default_rng(seed)
    count = megabytes * 1_000_000 // 4 // 64
    state: dict[str, np.ndarray] = {f"layer{i}.weight": rng.random(count, dtype=np.float32) for i in range(64)}
    state["bn.num_batches_tracked"] = np.asarray(100 + seed, dtype=np.int64)
    return state


def _ours(megabytes: int, spill: Path) -> tuple[Callable[[int, dict[str, np.ndarray]], None], Callable[[], Any]]:
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import FLContextKey, ReservedKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_common.abstract.model import make_model_learnable
    from nvflare.app_common.app_constant import AppConstants
    from nvflare.app_common.app_event_type import AppEventType

    from heterosync.flare import messages
    from heterosync.flare.aggregator import EqualWeightAggregator

    context = FLContext()
    workspace = SimpleNamespace(get_run_dir=lambda job: str(spill))  # all that the aggregator asks of its surroundings
    engine = SimpleNamespace(get_workspace=lambda: workspace)
    context.set_prop(ReservedKey.ENGINE, engine, private=True, sticky=False)
    context.set_prop(FLContextKey.CURRENT_RUN, "job", private=False, sticky=False)
    context.set_prop(AppConstants.GLOBAL_MODEL, make_model_learnable(_state(0, megabytes), {}))
    context.set_prop(AppConstants.CURRENT_ROUND, 0)
    aggregator = EqualWeightAggregator("hsl")
    aggregator.handle_event(EventType.START_RUN, context)
    aggregator.handle_event(AppEventType.ROUND_STARTED, context)

    def accept(i: int, state: dict[str, np.ndarray]) -> None:
        share = messages.tensors_message(state, {"method": "hsl", "round": 0, "samples": 100, "metrics": {}})
        share.set_peer_props({ReservedKey.IDENTITY_NAME: f"site-{i:02d}"})
        share.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
        if not aggregator.accept(share, context):
            raise RuntimeError(f"our aggregator refused a contribution: {aggregator.refused}")

    return accept, lambda: aggregator.aggregate(context)


def _stock(megabytes: int, spill: Path) -> tuple[Callable[[int, dict[str, np.ndarray]], None], Callable[[], Any]]:
    from nvflare.apis.dxo import DXO, DataKind, MetaKey
    from nvflare.apis.event_type import EventType
    from nvflare.apis.fl_constant import ReservedKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.app_common.aggregators.intime_accumulate_model_aggregator import InTimeAccumulateWeightedAggregator
    from nvflare.app_common.app_constant import AppConstants

    context = FLContext()
    context.set_prop(AppConstants.CURRENT_ROUND, 0)
    aggregator = InTimeAccumulateWeightedAggregator(expected_data_kind=DataKind.WEIGHTS)
    aggregator.handle_event(EventType.START_RUN, context)

    def accept(i: int, state: dict[str, np.ndarray]) -> None:
        share = DXO(DataKind.WEIGHTS, state, {MetaKey.NUM_STEPS_CURRENT_ROUND: 1}).to_shareable()
        share.set_peer_props({ReservedKey.IDENTITY_NAME: f"site-{i:02d}"})
        share.add_cookie(AppConstants.CONTRIBUTION_ROUND, 0)
        if not aggregator.accept(share, context):
            raise RuntimeError("the stock aggregator refused a contribution")

    return accept, lambda: aggregator.aggregate(context)


class PeakMemory:
    """Resident memory of this process above its start, sampled from a thread (the peak that the kernel keeps cannot
    be reset)."""

    def __enter__(self) -> PeakMemory:
        self._stop = threading.Event()
        self._start = self.peak = self._resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._resident())

    @property
    def mib(self) -> float:
        return max(self.peak - self._start, MIB) / MIB


def measure(side: str, contributions: int, megabytes: int) -> dict[str, float]:
    """Run one case in this process: seconds inside the aggregator, and MiB of peak memory above the baseline."""
    with tempfile.TemporaryDirectory() as folder:
        accept, finish = {"ours": _ours, "stock": _stock}[side](megabytes, Path(folder) / "spill")
        seconds = 0.0
        with PeakMemory() as memory:
            for i in range(contributions):
                state = _state(i, megabytes)
                start = time.perf_counter()
                accept(i, state)
                seconds += time.perf_counter() - start
                del state
            start = time.perf_counter()
            finish()
            seconds += time.perf_counter() - start
    return {"seconds": seconds, "mib": memory.mib}


def _in_child(side: str, contributions: int, megabytes: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.aggregation", side, str(contributions), str(megabytes)]
    root = Path(__file__).resolve().parents[1]
    package = Path(heterosync.__file__).resolve().parents[1]  # also where it is not installed
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, cwd=root, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def run(quick: bool = False) -> list[Measurement]:
    megabytes, counts = (2, (3, 6)) if quick else (95, (5, 50))
    found = []
    for count in counts:
        ours, stock = _in_child("ours", count, megabytes), _in_child("stock", count, megabytes)
        what = f"{count} x {megabytes} MB"
        found.append(
            Measurement(
                "aggregation",
                f"{what}, time",
                "s",
                ours["seconds"],
                stock["seconds"],
                stock["seconds"] / ours["seconds"],
            )
        )
        note = f"ours {ours['mib'] * MIB / 1e6 / megabytes:.1f} models"
        found.append(
            Measurement(
                "aggregation",
                f"{what}, peak memory",
                "MiB",
                ours["mib"],
                stock["mib"],
                stock["mib"] / ours["mib"],
                "<= 4 models",
                note,
            )
        )
    return found


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
