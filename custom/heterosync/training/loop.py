"""The local loop of one site: a round of epochs, the best snapshot, diagnostics, and a state that survives a crash."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heterosync.errors import SiteError, UserError
from heterosync.training.checks import check_shared
from heterosync.training.examples import Outcome
from heterosync.training.schedule import lr_at
from heterosync.training.state import load_state, request_digest, save_state, snapshot
from heterosync.training.steps import Steps, make_optimizer
from heterosync.training.task import LocalData, TaskLearner

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RoundResult:
    """What one round of one site made; only the shared part of `state` and allowed scalars of `metrics` may leave.

    `metrics`: val_auc_received, val_auc_best (both absent while a class is missing in the validation split; val_dice_…
    where the task's metric is Dice), best_epoch (from 0) and train_loss (mean of that epoch; both absent when the site
    made no step), n_train, n_validation, steps, seconds, and the method's diagnostics.
    """

    round: int
    state: dict[str, Tensor]  # the best snapshot of the round: full state, CPU
    metrics: dict[str, float]
    epochs: list[dict[str, Any]]  # epoch, lr, train_loss, val_auc or val_dice, val_loss, steps, skipped, seconds


class LocalTrainer:
    """Trains and evaluates `method` on one site's data.

    The first weights are the method's; where every tensor comes from the server they are not looked for at the site.
    After a round `model` holds the round's best snapshot. With `work` the end of every round is kept in work/state.pt.
    After each epoch `progress` gets {site, round, rounds, epoch, epochs, train_loss, val_auc (or the task's metric),
    seconds_per_epoch}. `received` is called in a round once the received model is scored, with the round and its score.
    """

    def __init__(
        self,
        method: TaskLearner,
        data: LocalData,
        site: str,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        work: Path | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.method, self.data, self.site, self.precision = method, data, site, precision
        self.device, self.task = torch.device(device), method.task
        self._examples = self.task.open(method, data, site, self.device, precision)
        self.progress = progress
        self.received: Callable[[int, float | None], None] = lambda round_, score: None
        self._state_file = Path(work) / "state.pt" if work is not None else None
        self._last: dict[str, Any] | None = None
        self._warned = False
        self.model = self._initial_model()
        self._shared_names = method.shared_names(self.model)
        self._own_names = frozenset(method.own_names(self.model))

    # -- a round -------------------------------------------------------------------------------------------------------

    def train_round(self, round_: int, shared: Mapping[str, Tensor] | None = None) -> RoundResult:
        """Receive `shared` (None: go on with the own model), train, return the best snapshot.

        The last finished round asked again, with the same tensors and settings, returns the stored result; with others
        it is trained again from the personal tensors and moments that it had started from (always so for a network that
        is cut: the server's half takes part in every step). Raises `UserError` for tensors that do not fit and for a
        training that diverges; the model is then what it was after the last finished round.
        """
        training = replace(self.method.training, rounds=1)  # more rounds do not make it another request
        request = request_digest(shared, self.method.settings, training, self.precision)
        done = None if self.method.split else self._last
        if done is not None and done["round"] == round_ and done["request"] == request:
            return self._result(done)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            start = self._rewind(round_)
            before = self._last["moments"] if self._last is not None else None
            try:
                record = {**self._train(round_, shared), "start": start, "moments_before": before}
            except BaseException as error:
                self.model.load_state_dict(self._last["state"] if self._last else self._initial_model().state_dict())
                if type(error) is UserError:  # of a method, which does not know its site
                    raise SiteError(f"site {self.site}, round {round_}: {error}") from error
                raise
        self._last = {**record, "method": self.method.name, "site": self.site, "request": request}
        self.save()
        return self._result(self._last)

    def _rewind(self, round_: int) -> dict[str, Tensor]:
        """Take back what this round, or a later one, did before; the own tensors that the round starts from."""
        if self._last is not None and round_ == 0:  # a new run: nothing of the old one may stay
            self.model.load_state_dict(self._initial_model().state_dict())
            self._last = None
        elif self._last is not None and self._last["round"] == round_:
            self.model.load_state_dict(self._last["start"], strict=False)
            self._last = {**self._last, "moments": self._last["moments_before"]}
        elif self._last is not None and self._last["round"] > round_ and self._last["start"]:
            later = self._last["round"]
            log.warning("site %s: round %d starts from personal tensors of round %d", self.site, round_, later)
        return {name: value for name, value in snapshot(self.model).items() if name in self._own_names}

    def _train(self, round_: int, shared: Mapping[str, Tensor] | None) -> dict[str, Any]:
        self._examples.check_trainable()
        settings, method, start = self.method.training, self.method, time.perf_counter()
        if shared:
            self._receive(shared)
        method.round_start(self.model, shared or {}, self._examples)
        received, _ = self.validation_score()
        self.received(round_, received)
        optimizer = make_optimizer(self.model, settings)
        if settings.keep_moments and self._last is not None and self._last["moments"] is not None:
            optimizer.load_state_dict(copy.deepcopy(self._last["moments"]))
        steps = Steps(method, self.model, self.site, self.device, self.precision)
        trace = [entry for entry in (self._last or {}).get("trace", []) if entry[0] < round_]
        epochs: list[dict[str, Any]] = []
        best: dict[str, Tensor] | None = None
        moments: dict[str, Any] | None = self._last["moments"] if self._last is not None else None
        best_value, best_epoch, without_gain = -float("inf"), 0, 0
        score = f"val_{self.task.metric}"
        for epoch in range(settings.local_epochs if method.trains(self.model) else 0):
            began = time.perf_counter()
            lr = lr_at(round_ * settings.local_epochs + epoch, settings, [value for _, value in trace])
            for group in optimizer.param_groups:
                group["lr"] = lr
            batches = method.batches(self.model, self._examples, round_, epoch)
            outcome = steps.run(batches, optimizer, round_, epoch)
            if not outcome.steps:
                break
            # where the network is cut, what the other half is by now is known after the round
            reached, val_loss = (None, 0.0) if method.split else self.validation_score()
            value = reached if reached is not None else -val_loss
            trace.append([round_, value])
            without_gain = 0 if value > best_value else without_gain + 1
            if value >= best_value:  # ties to the later epoch, as the 2025 code
                best, best_value, best_epoch = snapshot(self.model), value, epoch
                moments = copy.deepcopy(optimizer.state_dict()) if settings.keep_moments else None
            scores = {"epoch": epoch, "lr": lr, "train_loss": outcome.loss, score: reached, "val_loss": val_loss}
            seconds = time.perf_counter() - began
            epochs.append({**scores, "steps": outcome.steps, "skipped": outcome.skipped, "seconds": seconds})
            self._report(round_, epochs)
            if without_gain >= settings.patience and not method.split:
                break
        if best is not None:
            self.model.load_state_dict(best)
            method.round_end(self.model, self._examples)
        best = snapshot(self.model)
        chosen = {"best_epoch": best_epoch, "train_loss": epochs[best_epoch]["train_loss"]} if epochs else {}
        measured = {
            self.task.received: received,
            self.task.best: epochs[best_epoch][score] if epochs else received,
            **chosen,
            "n_train": len(self.data.splits["train"]),
            "n_validation": len(self.data.splits["validation"]),
            "steps": sum(epoch["steps"] for epoch in epochs),
            **method.diagnostics(self.model, self._examples),
            "seconds": time.perf_counter() - start,
        }
        metrics = {name: float(value) for name, value in measured.items() if value is not None}
        record = {"round": round_, "state": best, "metrics": metrics, "epochs": epochs, "moments": moments}
        return {**record, "trace": trace}

    def _receive(self, shared: Mapping[str, Tensor]) -> None:
        check_shared(shared, self._shared_names, self.model.state_dict(), f"site {self.site}: received model")
        self.method.receive(self.model, shared)

    def _report(self, round_: int, epochs: list[dict[str, Any]]) -> None:
        if epochs[-1]["skipped"]:
            log.warning("site %s, round %d: %d steps skipped (not finite)", self.site, round_, epochs[-1]["skipped"])
        if self.progress is not None:
            settings = self.method.training
            self.progress(
                {
                    "site": self.site,
                    "round": round_,
                    "rounds": settings.rounds,
                    "epoch": epochs[-1]["epoch"],
                    "epochs": settings.local_epochs,
                    "train_loss": epochs[-1]["train_loss"],
                    f"val_{self.task.metric}": epochs[-1][f"val_{self.task.metric}"],
                    "seconds_per_epoch": sum(epoch["seconds"] for epoch in epochs) / len(epochs),
                }
            )

    # -- scores --------------------------------------------------------------------------------------------------------

    def evaluate(self, split: str, shared: Mapping[str, Tensor] | None = None) -> Outcome:
        """Scores and metrics of a split ("train", "validation", "test"); with `shared`, of that model.

        The own model is afterwards what it was. Raises `UserError` for an unknown split.
        """
        with self._holding(shared):
            return self._examples.evaluate(self.model, split)

    def validation_score(self) -> tuple[float | None, float]:
        """The task's metric and mean loss on the validation split. Without a metric (None: a class is absent) the loss
        chooses the best epoch; without anything to validate on the last epoch does."""
        reached, loss = self._examples.validate(self.model)
        if reached is None and not self._warned:
            self._warned = True
            what = "validation loss" if len(self.data.splits["validation"]) else "last epoch"
            why = f"{self.task.undefined}, its {self.task.shown} is undefined"
            log.warning("site %s: %s; the %s chooses the best snapshot", self.site, why, what)
        return reached, loss

    def state_with(self, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The own model's state had it received `shared`; the model itself stays what it is."""
        with self._holding(shared):
            return snapshot(self.model)

    @contextmanager
    def _holding(self, shared: Mapping[str, Tensor] | None) -> Iterator[None]:
        if not shared:
            yield
            return
        own = snapshot(self.model)
        try:
            self._receive(shared)
            yield
        finally:
            self.model.load_state_dict(own)

    # -- state ---------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the end of the last finished round to work/state.pt, in one step."""
        if self._state_file is not None and self._last is not None:
            save_state(self._state_file, self._last)

    def restore(self) -> int | None:
        """Take up work/state.pt; the last finished round, None without a file. Raises `UserError` if it is damaged."""
        record = load_state(self._state_file, self.method.name, self.site) if self._state_file is not None else None
        if record is None:
            return None
        try:
            self.model.load_state_dict(record["state"])
        except RuntimeError as error:
            raise SiteError(
                f"site {self.site}: resume state {self._state_file} is of another network: choose another work folder"
            ) from error
        record.pop("format")
        self._last = record
        return int(record["round"])

    def _result(self, record: dict[str, Any]) -> RoundResult:
        return RoundResult(record["round"], dict(record["state"]), dict(record["metrics"]), list(record["epochs"]))

    def _initial_model(self) -> nn.Module:
        model = self.method.build_model(weights="none")
        if set(self.method.shared_names(model)) != set(model.state_dict()):  # something does not come from the server
            model = self.method.build_model()
        return model.to(self.device, memory_format=self.task.layout)
