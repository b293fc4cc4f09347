"""The record of a run, whole on disk after every round."""

from __future__ import annotations

import csv
import io
import logging
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from heterosync.federation.checkin import versions
from heterosync.federation.initial import initial_weights
from heterosync.files import make_folder, read_json, write_json, write_text
from heterosync.methods import get_method
from heterosync.training import CLASSIFICATION

HISTORY, CROSS_SITE, RUN, TENSORBOARD = "history.csv", "cross_site_metrics.json", "run.json", "tensorboard"
#: Name that the mean over sites has beside the names of the sites.
MEAN = "mean"
log = logging.getLogger("heterosync")


class RunRecorder:
    """Writes history.csv, cross_site_metrics.json, run.json and TensorBoard events into `folder`.

    info: what is known at the start (method, method_settings, training, sites, labels, anchor_digest, …); goes into
    run.json as it is, beside `initial_weights` (imagenet, none, a file's hash; null: see each site's check-in).
    start_round: 0 starts a new record, r > 0 goes on with the record in `folder` after r rounds.

    history.csv holds rows (round, site, metric, value). The `val_auc_received` (of volumes `val_dice_received`) of
    round r is the score of the global model after r rounds; the last fusion R has a row of its own.
    cross_site_metrics.json is model -> site -> metrics, with the site `mean` for the plain means over sites and the
    number of `sites`.
    """

    def __init__(self, folder: Path | str, info: Mapping[str, Any], start_round: int = 0):
        self.folder = make_folder(folder)
        self._began = time.monotonic()
        self._task = get_method(info["method"]).task if "method" in info else CLASSIFICATION
        self._run: dict[str, Any] = {
            **info,
            "versions": dict(versions()),
            "initial_weights": None,
            "status": "running",
            "started": _now(),
            "ended": None,
            "wall_seconds": 0.0,
            "rounds": [],
        }
        self._history: list[list[Any]] = []
        self._cross: dict[str, dict[str, dict[str, Any]]] = {}
        self._earlier = 0.0  # seconds of the sessions before this one
        if start_round > 0:
            self._take_up(start_round)
        elif "method" in info and info.get("topology") != "swarm":  # whose server makes no first weights
            self._run["initial_weights"] = initial_weights(info["method"], info.get("training"))
        self._total = int(dict(info.get("training") or {}).get("rounds", 0))
        self._events = EventFileWriter(str(make_folder(self.folder / TENSORBOARD)), flush_secs=3600)
        self._events.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # Viewers drop what an earlier, interrupted session wrote from this step on.
        start = SessionLog(status=SessionLog.START)
        self._events.add_event(Event(wall_time=time.time(), step=start_round, session_log=start))
        self._write()

    @property
    def rounds(self) -> Sequence[Mapping[str, Any]]:
        """The records of the finished rounds, as in run.json."""
        return tuple(self._run["rounds"])

    def checked_in(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Record what the sites said of themselves before round 0."""
        self.note(check_in={site: dict(reports[site]) for site in sorted(reports)})

    def site_done(self, round_: int, site: str, metrics: Mapping[str, float]) -> None:
        """Say that a site's contribution of a round is in; nothing is written."""
        log.info("round %s, site %s: %s", self._of_total(round_), site, self._in_words(metrics))

    def round_done(
        self,
        round_: int,
        contributors: Sequence[str],
        metrics: Mapping[str, Mapping[str, float]],
        refused: Mapping[str, str] | None = None,
        seconds: float = 0.0,
        payload: Mapping[str, int] | None = None,
    ) -> None:
        """Record a finished round: who contributed, each site's scalars, who was refused and why, bytes received."""
        self._forget_from(round_)
        self._run["rounds"].append(
            {
                "round": round_,
                "contributors": sorted(contributors),
                "refused": dict(refused or {}),
                "seconds": round(seconds, 3),
                "bytes": dict(payload or {}),
            }
        )
        self._add(round_, metrics)
        self._write()
        mean = _mean([scalars.get(self._task.received) for scalars in metrics.values()])
        score = f", mean validation {self._task.shown} before it {mean:.3f}" if mean is not None else ""
        left = f", about {_duration(self._time_left(round_))} left" if self._total > round_ + 1 else ""
        who = ", ".join(sorted(contributors)) or "nobody"
        log.info("round %s done in %s by %s%s%s", self._of_total(round_), _duration(seconds), who, score, left)

    def validation(self, round_: int, scores: Mapping[str, float | None]) -> None:
        """Record the validation score by site of the global model after `round_` rounds, the last fusion."""
        known = {site: {self._task.received: value} for site, value in scores.items() if value is not None}
        self._add(round_, known)
        self._write()

    def tested(self, model: str, site: str, metrics: Mapping[str, Any]) -> None:
        """Record one model's metrics on one site's test split."""
        sites = self._cross.setdefault(model, {})
        sites.pop(MEAN, None)
        sites[site] = dict(metrics)
        ordered: dict[str, dict[str, Any]] = {name: sites[name] for name in sorted(sites)}
        trained = [found for name, found in ordered.items() if name not in self._run.get("receivers", ())]
        means = {name: _mean([found.get(name) for found in trained]) for name in self._task.averaged}
        self._cross[model] = {**ordered, MEAN: {**means, "sites": len(trained)}}
        values = [
            Summary.Value(tag=f"test_{name}/{site}/{model}", simple_value=float(metrics[name]))
            for name in self._task.averaged
            if metrics.get(name) is not None
        ]
        step = len(self._run["rounds"])
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._write()

    def note(self, **facts: Any) -> None:
        """Put further facts into run.json, for example the best round."""
        self._run.update(facts)
        self._write()

    def finish(self, status: str) -> None:
        """End the record with "completed", "stopped: why" or "failed: why"; no calls after this."""
        self._run["status"] = status
        self._run["ended"] = _now()
        self._write()
        self._events.close()
        log.info("run %s after %s: %s", status, _duration(self._run["wall_seconds"]), self.folder)

    # -- inner ---------------------------------------------------------------------------------------------------------

    def _take_up(self, start_round: int) -> None:
        old = read_json(self.folder / RUN)
        self._run["rounds"] = old.get("rounds", [])
        self._run["started"] = old.get("started", self._run["started"])
        self._run["initial_weights"] = old.get("initial_weights")
        self._earlier = float(old.get("wall_seconds", 0.0))
        self._history = [list(row) for row in read_history(self.folder)]
        self._forget_from(start_round)

    def _forget_from(self, round_: int) -> None:
        """A repeated round replaces what was recorded of it and of all after it."""
        self._run["rounds"] = [record for record in self._run["rounds"] if record["round"] < round_]
        self._history = [row for row in self._history if row[0] < round_]

    def _add(self, round_: int, metrics: Mapping[str, Mapping[str, float]]) -> None:
        values = []
        for site in sorted(metrics):
            for name, value in metrics[site].items():
                self._history.append([round_, site, name, value])
                values.append(Summary.Value(tag=f"{name}/{site}", simple_value=float(value)))
        mean = _mean([scalars.get(self._task.received) for scalars in metrics.values()])
        if mean is not None:
            values.append(Summary.Value(tag=f"{self._task.received}/{MEAN}", simple_value=mean))
        self._events.add_event(Event(wall_time=time.time(), step=round_, summary=Summary(value=values)))

    def _write(self) -> None:
        self._run["wall_seconds"] = round(self._earlier + time.monotonic() - self._began, 3)
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([["round", "site", "metric", "value"], *self._history])
        write_text(self.folder / HISTORY, text.getvalue())
        write_json(self.folder / CROSS_SITE, self._cross)
        write_json(self.folder / RUN, self._run)
        self._events.flush()

    def _time_left(self, round_: int) -> float:
        recent = [record["seconds"] for record in self._run["rounds"][-5:]]
        return sum(recent) / len(recent) * (self._total - round_ - 1)

    def _in_words(self, metrics: Mapping[str, float]) -> str:
        parts = []
        if self._task.received in metrics:
            parts.append(f"validation {self._task.shown} received {metrics[self._task.received]:.3f}")
        if self._task.best in metrics:
            parts.append(f"best {metrics[self._task.best]:.3f}")
        if "train_loss" in metrics:
            parts.append(f"loss {metrics['train_loss']:.4f}")
        if "seconds" in metrics:
            parts.append(_duration(metrics["seconds"]))
        return ", ".join(parts) or "done"

    def _of_total(self, round_: int) -> str:
        return f"{round_ + 1}/{self._total}" if self._total else str(round_ + 1)


def read_history(folder: Path | str) -> list[tuple[int, str, str, float]]:
    """Rows (round, site, metric, value) of the history.csv in `folder`; none when there is none yet."""
    path = Path(folder) / HISTORY
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    return [(int(round_), site, metric, float(value)) for round_, site, metric, value in rows]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
