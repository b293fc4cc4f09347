"""Time that a round costs beside training: five sites send back the model they got, in FLARE's simulator.

    python benchmarks/round_overhead.py [--sites 5] [--rounds 6] [--backbone resnet18]

The job is the committed HSL job with another executor (`Echo`, below), so messages, filter, fusion, model file and
records are the real ones. Prints the median seconds per round over all rounds but the first, and the peak memory of
the server.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path

import psutil
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor

from heterosync.federation.checkin import versions
from heterosync.flare import messages


class Echo(Executor):
    """Answers every task at once; the tensors of a training are those it was sent."""

    def __init__(self, method: str, method_settings: dict, training: dict, in_process: bool):
        super().__init__()
        self.method = method

    def handle_event(self, event_type, fl_ctx):
        if event_type == EventType.START_RUN:
            messages.register_tensors()
            self.logger.info("site %s: %s", fl_ctx.get_identity_name(), messages.READY)

    def execute(self, task_name, shareable, fl_ctx, abort_signal):
        if task_name == messages.CHECK_IN:
            digest = "0" * 64
            report = {
                "site": fl_ctx.get_identity_name(),
                "method": self.method,
                "anchor_digest": digest,
                "labels": ["no", "yes"],
                "model_hash": digest,
                "initial_weights": None,
                "precision": "float32",
                "versions": dict(versions()),
                "counts": {"train": 1, "validation": 1, "test": 1},
            }
            return messages.scalars_message(report)
        if task_name == messages.VALIDATE:
            return messages.scalars_message({"auc": 0.5})
        tensors, _ = messages.open_message(shareable)
        fields = {"method": self.method, "round": messages.round_of(shareable), "samples": 1}
        return messages.tensors_message(tensors, {**fields, "metrics": {"val_auc_received": 0.5}})


def measure(sites: int, rounds: int, backbone: str, folder: Path) -> dict[str, float]:
    """Seconds per round (median without round 0), seconds in all, and the peak resident memory of the server in MiB."""
    from heterosync.flare.jobs.builder import build_job
    from heterosync.flare.jobs.options import JobOptions
    from heterosync.flare.running.simulator import simulate

    training = {"rounds": rounds, "backbone": backbone, "weights": "none", "precision": "float32"}
    job = build_job("hsl", folder / "job", JobOptions(training=training))
    custom = job / "app" / "custom"
    custom.mkdir()
    shutil.copy(__file__, custom / "echo.py")
    client = job / "app" / "config" / "config_fed_client.json"
    config = json.loads(client.read_text())
    config["executors"][0]["executor"]["path"] = "echo.Echo"
    client.write_text(json.dumps(config))
    names = [f"site-{i}" for i in range(1, sites + 1)]
    for name in names:
        (folder / "data" / name).mkdir(parents=True)
    peak = [0.0]

    def watch(line: str) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                if "--client" not in process.cmdline():
                    high = Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0]
                    peak[0] = max(peak[0], int(high) / 1024)
            except (psutil.Error, OSError, IndexError):
                continue

    result = simulate(job, folder / "ws", names, folder / "data", log=watch)
    record = json.loads((result.results / "run.json").read_text())
    history = [entry["seconds"] for entry in record["rounds"]]
    return {
        "seconds_per_round": statistics.median(history[1:]),
        "seconds": record["wall_seconds"],
        "server_mib": peak[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--backbone", default="resnet18")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(arguments.sites, arguments.rounds, arguments.backbone, Path(folder)), indent=2))


if __name__ == "__main__":
    main()
