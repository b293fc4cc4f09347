"""One site of a federation: its data, its model, its results. Everything it must remember lies in its work folder."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterosync.data.site import MANIFEST
from heterosync.errors import ProblemList, UserError
from heterosync.federation import checkin
from heterosync.federation.contribution import Contribution
from heterosync.federation.initial import own_weights
from heterosync.federation.modelfile import OWN_BEST, PROVISIONED, load_model, save_model
from heterosync.federation.predictions import write_predictions
from heterosync.federation.split import Ask, meet, refuse_own_batches
from heterosync.federation.trainings import difference
from heterosync.federation.wire import WirePolicy, is_site_name, reportable
from heterosync.files import make_folder, read_json, write_json
from heterosync.methods import make_method
from heterosync.training.checks import check_device, few_scored
from heterosync.training.examples import Outcome
from heterosync.training.loop import LocalTrainer
from heterosync.training.precision import choose_precision
from heterosync.training.selection import BestRound
from heterosync.training.state import snapshot
from heterosync.training.task import LocalData

#: What each site's own best model is called.
OWN_MODEL = "local"

#: Environment variable with the number of CPU threads of a trainer.
THREADS = "HETEROSYNC_THREADS"
PRECISION = "precision.json"  # in the work folder, from the first opening of a training on


def thread_count(configured: int | None, environ: Mapping[str, str] = os.environ) -> int | None:
    """CPU threads of a trainer: `threads` of site.yaml, else HETEROSYNC_THREADS; None leaves it to torch, which uses
    OMP_NUM_THREADS, else all cores. For several trainers on one machine. Raises `UserError` for a bad variable.
    """
    text = environ.get(THREADS, "")
    if configured is not None or not text:
        return configured
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise UserError(f"environment variable {THREADS} is '{text}': give the number of CPU threads, 1 or more")
    return int(text)


class SiteTrainer:
    """Answers the three questions of a federation for one site: check_in, train, validate.

    folder: the site folder (docs/data.md); for a pooled method also a folder of site folders, or these by name. work:
    this site's folder of this training; another SiteTrainer on the same folder goes on where this one stopped. results:
    where test results go, None for work/results. method_settings, training: what differs from the defaults; the site's
    own batch size and device (site.yaml) win. log: gets one line per local epoch.

    A manifest that has changed is read anew before the next round: new images join, old ones keep their split.

    Raises `UserError` for unknown settings, for a site folder with problems (all at once) and for a work folder that
    belongs to another run.
    """

    def __init__(
        self,
        site: str,
        folder: Path | str | Mapping[str, Path | str],
        method_name: str,
        method_settings: Mapping[str, Any] | None,
        training: Mapping[str, Any] | None,
        work: Path | str,
        log: Callable[[str], None] | None = None,
        results: Path | str | None = None,
    ):
        if not is_site_name(site):
            raise UserError(f"site name '{site}': use letters, digits, '-', '_' and '.', at most 63 of them")
        self.site, self.folder, self.work = site, folder, Path(work)
        self._results = Path(results) if results is not None else self.work / "results"
        self.method = make_method(method_name, dict(method_settings or {}), training)
        self.task = self.method.task
        self._log = log or logging.getLogger("heterosync").info
        self.method.tell = lambda line: self._log(f"site {site}: {line}")
        make_folder(self.work)
        self._claim()
        self._opened: LocalTrainer | None = None
        self._manifest = ""
        self._finished: int | None = None  # the round that was trained last
        self.exchange: Ask | None = None  # how a site whose network is cut asks the server, set before each round

    # -- what a federation asks ----------------------------------------------------------------------------------------

    def check_in(self) -> dict[str, Any]:
        """What this site says of itself before round 0: the fields of `wire.CHECK_IN`. Checks all of its data."""
        trainer = self._trainer()
        data = trainer.data
        report = {
            "site": self.site,
            "method": self.method.name,
            "anchor_digest": data.anchor_digest if self.method.needs_anchor else None,
            "labels": list(data.labels),
            "model_hash": checkin.model_hash(trainer.model),
            "initial_weights": own_weights(self.method, trainer.model),
            "precision": trainer.precision,
            "versions": dict(checkin.versions()),
            "counts": {split: len(rows) for split, rows in data.splits.items()},
        }
        WirePolicy(self.method.name, {}).check_report(report)
        return report

    def train(self, round_: int, shared: Mapping[str, Tensor] | None, items: int = 0) -> Contribution:
        """Train round `round_` from the state `shared`; the best snapshot's shared tensors and the round's metrics.

        Asked again for the round it finished last, with the same state, it answers the same without training. Not so
        where the network is cut: its round goes through `exchange`, with as many `items` per epoch at every site.
        """
        trainer = self._trainer()
        if self.method.split:  # new images would be more steps: they join with the next job
            meet(self.site, self.method, trainer.model, len(trainer.data.splits["train"]), items, self.exchange)
        else:
            trainer = self._with_new_images(trainer)
        result = trainer.train_round(round_, shared or None)
        self._finished = round_
        names = self.method.returned_names(trainer.model)
        if not self.method.shared_names(trainer.model):
            self._keep_own_best(round_, result.metrics.get(self.task.best), result.state)
        return Contribution(
            site=self.site,
            method=self.method.name,
            round=round_,
            tensors={name: result.state[name] for name in names},
            metrics=reportable(result.metrics),
            samples=len(trainer.data.splits["train"]),
        )

    def validate(
        self, shared: Mapping[str, Tensor] | None, split: str, model_name: str, rounds: int = 0
    ) -> dict[str, float]:
        """Score `split` with the global state `shared`, or with this site's own best model when there is none.

        A personal method combines `shared` with what the site keeps; scored on the validation split, as after the last
        round, the outcome is a candidate for the own best model.

        For the test split, the results folder gets predictions.csv and metrics.json, one entry per `model_name`; at a
        site without training data, which takes part to receive the model, also its file, of a model of `rounds` rounds.
        Returned are the defined scalars only: auc, ci_low, ci_high, accuracy, recall, precision, n, n_positive; for
        volumes dice, dice_sd, ci_low, ci_high, hd95, volume_error, n, n_missed.
        """
        trainer = self._trainer()
        result = trainer.evaluate(split, shared) if shared else self._evaluate_own(trainer, split)
        if shared and split == "validation" and self.method.personal and self._finished is not None:
            self._keep_own_best(self._finished, result.metrics[self.task.metric], trainer.state_with(shared))
        if split == "test":
            write_predictions(self._results, self.site, self.task.columns, result, split, model_name)
            if shared and self.method.one_model and not len(trainer.data.splits["train"]):
                self._save(self._results / f"{model_name}_model.pt", shared, rounds)
        return reportable(result.metrics)

    # -- opening -------------------------------------------------------------------------------------------------------

    def _trainer(self) -> LocalTrainer:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> LocalTrainer:
        settings = self.method.training
        self._manifest = self._manifest_state()
        data = self._load()
        threads = thread_count(data.config.threads)
        if threads is not None:
            torch.set_num_threads(threads)
        if data.config.batch_size is not None:
            refuse_own_batches(self.site, self.method, data.config.batch_size)
            self.method.training = replace(settings, batch_size=data.config.batch_size)
        device = data.config.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        check_device(self.site, torch.device(device))
        earlier = (self.work / PRECISION).exists()  # this training was opened here before, and told then
        trainer = self._over(data, device, self._precision(device))
        for line in () if earlier else few_scored(self.site, data, self.task.items):
            self._log(line)
        return trainer

    def _load(self) -> LocalData:
        try:
            return self.task.load(self.folder, self.method.training, self.method.needs_anchor, self.method.pooled)
        except UserError as error:
            raise ProblemList([f"site {self.site}: {line}" for line in str(error).splitlines()]) from error

    def _over(self, data: LocalData, device: str, precision: str) -> LocalTrainer:
        trainer = LocalTrainer(self.method, data, self.site, device, precision, self.work, self._report)
        finished = self._finished = trainer.restore()
        if self.method.personal and self.method.shared_names(trainer.model):
            trainer.received = lambda round_, score: self._received(trainer, round_, score)
        again = f", goes on after round {finished}" if finished is not None else ""
        counts = ", ".join(f"{len(rows)} {split}" for split, rows in data.splits.items())
        self._log(f"site {self.site}: {counts} {self.task.items}; {device}, {precision}{again}")
        return trainer

    def _with_new_images(self, trainer: LocalTrainer) -> LocalTrainer:
        """`trainer`, over the images that the manifest has now. While it cannot be used, as in the middle of an edit,
        the round goes on with the images at hand; what is wrong is logged."""
        state = self._manifest_state()
        if state == self._manifest:
            return trainer
        self._manifest = state
        try:
            data = self._load()
            if (data.labels, data.anchor_digest) != (trainer.data.labels, trainer.data.anchor_digest):
                raise UserError(f"site {self.site}: labels or anchor pack changed while the job runs: put them back")
        except UserError as error:
            for line in str(error).splitlines():
                self._log(f"{line}; the round goes on with the images as they were")
            return trainer
        self._opened = self._over(data, str(trainer.device), trainer.precision)
        return self._opened

    def _manifest_state(self) -> str:
        """Changes when a manifest does."""
        folders = [*self.folder.values()] if isinstance(self.folder, Mapping) else [self.folder]
        files = [Path(folder) / MANIFEST for folder in folders]
        if self.method.pooled:
            files += [file for folder in folders for file in sorted(Path(folder).glob(f"*/{MANIFEST}"))]
        return " ".join(hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file())

    def _precision(self, device: str) -> str:
        """Decided once per run and kept, so that a restarted site goes on with the same arithmetic."""
        file = self.work / PRECISION
        if file.exists():
            return str(read_json(file)["precision"])
        precision, seconds = choose_precision(self.method, device)
        write_json(file, {"precision": precision, "device": device, "seconds_per_step": seconds})
        return precision

    def _claim(self) -> None:
        """Tie the work folder to this site, method and settings (the number of rounds may change)."""
        mine = {
            "site": self.site,
            "method": self.method.name,
            "method_settings": self.method.settings.to_dict(),
            "training": self.method.training.to_dict(),
        }
        file = self.work / "trainer.json"
        if not file.exists():
            write_json(file, mine)
            return
        other = difference(mine, read_json(file))
        if other:
            where = f"site {self.site}: work folder {self.work}"
            raise UserError(f"{where} belongs to a run with another {other}: delete it or choose another one")

    # -- own models and results ----------------------------------------------------------------------------------------

    def _received(self, trainer: LocalTrainer, round_: int, score: float | None) -> None:
        """A personal method's model of the round before, fused: what this site would use from now on."""
        if round_ > 0:  # the initial model is never the best
            self._keep_own_best(round_ - 1, score, snapshot(trainer.model))

    def _keep_own_best(self, round_: int, value: float | None, state: Mapping[str, Tensor]) -> None:
        """Of the models of this site alone, keep the one with the highest validation score (ties: the later round)."""
        file, kept_as = self.work / OWN_BEST, f"validation_{self.task.metric}"  # NaN: undefined
        best = BestRound()
        if file.exists() and round_ > 0:
            known = load_model(file, self.method.name)
            earlier = float(known.assets[kept_as])
            best.update(known.round - 1, None if math.isnan(earlier) else earlier)
        if best.update(round_, value):
            score = torch.tensor(math.nan if value is None else value, dtype=torch.float64)
            self._save(file, state, round_ + 1, {kept_as: score})

    def _save(
        self, file: Path, state: Mapping[str, Tensor], rounds: int, extra: Mapping[str, Tensor] | None = None
    ) -> None:
        method, labels, provisioned = self.method, self._trainer().data.labels, self.method.provisioned()
        origin = {PROVISIONED: provisioned} if provisioned else None
        save_model(file, method.name, method.settings, method.training, state, labels, rounds, extra, origin)

    def _evaluate_own(self, trainer: LocalTrainer, split: str) -> Outcome:
        file = self.work / OWN_BEST
        if not file.exists():
            return trainer.evaluate(split)
        current = snapshot(trainer.model)
        try:
            trainer.model.load_state_dict(load_model(file, self.method.name).state)
            return trainer.evaluate(split)
        finally:
            trainer.model.load_state_dict(current)

    def _report(self, event: Mapping[str, Any]) -> None:
        where = f"round {event['round'] + 1}/{event['rounds']}, epoch {event['epoch'] + 1}/{event['epochs']}"
        value = event[f"val_{self.task.metric}"]
        reached = f", validation {self.task.shown} " + ("undefined" if value is None else f"{value:.3f}")
        score = "" if self.method.split else reached
        pace = f"{event['seconds_per_epoch']:.1f} s per epoch"
        self._log(f"site {self.site}: {where}: loss {event['train_loss']:.4f}{score}, {pace}")
