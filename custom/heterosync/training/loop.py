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

import numpy as np
import torch
from torch import Tensor, nn

from heterosync.data.dataset import SiteData
from heterosync.errors import UserError, nearest
from heterosync.training.batches import Batch, plan_epoch
from heterosync.training.checks import check_fit, check_shared, check_trainable
from heterosync.training.evaluation import Evaluation, score
from heterosync.training.feed import Feed
from heterosync.training.learner import Learner
from heterosync.training.metrics import binary_metrics
from heterosync.training.schedule import lr_at
from heterosync.training.seeds import stream
from heterosync.training.state import load_state, request_digest, save_state, snapshot
from heterosync.training.steps import Steps, make_optimizer

log = logging.getLogger(__name__)

DIAGNOSTIC_ITEMS = 16


@dataclass(frozen=True)
class RoundResult:
    """What one round of one site made; only the shared part of `state` and allowed scalars of `metrics` may leave.

    `metrics`: val_auc_received, val_auc_best (both absent while a class is missing in the validation split), best_epoch
    (from 0), train_loss (mean of the best epoch), n_train, n_validation, steps, seconds, and the method's diagnostics.
    """

    round: int
    state: dict[str, Tensor]  # the best snapshot of the round: full state, CPU
    metrics: dict[str, float]
    epochs: list[dict[str, Any]]  # epoch, lr, train_loss, val_auc, val_loss, steps, skipped, seconds


class LocalTrainer:
    """Trains and evaluates `method` on one site's data.

    The first weights are the method's; where every tensor comes from the server they are not looked for at the site.
    After a round `model` holds the round's best snapshot. With `work` the end of every round is kept in work/state.pt.
    After each epoch `progress` gets {site, round, rounds, epoch, epochs, train_loss, val_auc, seconds_per_epoch}.
    `received` is called in a round once the received model is scored, with the round and its AUC.
    """

    def __init__(
        self,
        method: Learner,
        data: SiteData,
        site: str,
        device: str | torch.device = "cpu",
        precision: str = "float32",
        work: Path | None = None,
        progress: Callable[[dict[str, Any]], None] | None = None,
    ):
        self.method, self.data, self.site, self.precision = method, data, site, precision
        self.device = torch.device(device)
        check_fit(site, method, data, self.device, precision)
        self.progress = progress
        self.received: Callable[[int, float | None], None] = lambda round_, auc: None
        self._state_file = Path(work) / "state.pt" if work is not None else None
        self._last: dict[str, Any] | None = None
        self._warned = False
        self._primary = Feed(data.primary, self.device)
        self._anchor = Feed(data.anchor, self.device) if data.anchor is not None else None
        self.model = self._initial_model()
        self._shared_names = method.shared_names(self.model)
        self._own_names = frozenset(method.own_names(self.model))

    # -- a round -------------------------------------------------------------------------------------------------------

    def train_round(self, round_: int, shared: Mapping[str, Tensor] | None = None) -> RoundResult:
        """Receive `shared` (None: go on with the own model), train, return the best snapshot.

        The last finished round asked again, with the same tensors and settings, returns the stored result; with others
        it is trained again from the personal tensors that it had started from. Raises `UserError` for tensors that do
        not fit and for a training that diverges; the model is then what it was after the last finished round.
        """
        training = replace(self.method.training, rounds=1)  # more rounds do not make it another request
        request = request_digest(shared, self.method.settings, training, self.precision)
        if self._last is not None and self._last["round"] == round_ and self._last["request"] == request:
            return self._result(self._last)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            start = self._rewind(round_)
            try:
                record = {**self._train(round_, shared), "start": start}
            except BaseException:
                self.model.load_state_dict(self._last["state"] if self._last else self._initial_model().state_dict())
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
        elif self._last is not None and self._last["round"] > round_ and self._last["start"]:
            later = self._last["round"]
            log.warning("site %s: round %d starts from personal tensors of round %d", self.site, round_, later)
        return {name: value for name, value in snapshot(self.model).items() if name in self._own_names}

    def _train(self, round_: int, shared: Mapping[str, Tensor] | None) -> dict[str, Any]:
        check_trainable(self.site, self.method, self.data)
        settings, method, start = self.method.training, self.method, time.perf_counter()
        if shared:
            self._receive(shared)
        method.round_start(self.model, shared or {})
        received_auc, _ = self.validation_score()
        self.received(round_, received_auc)
        optimizer = make_optimizer(self.model, settings)
        if settings.keep_moments and self._last is not None and self._last["moments"] is not None:
            optimizer.load_state_dict(copy.deepcopy(self._last["moments"]))
        rows = self.data.splits["train"]
        labels = self.data.primary.labels[rows]
        anchor = self._anchor if method.uses_anchor else None
        steps = Steps(method, self.model, self.site, self._primary, anchor, self.device, self.precision)
        epochs: list[dict[str, Any]] = []
        best: dict[str, Tensor] = {}
        moments: dict[str, Any] | None = None
        best_value, best_epoch, without_gain = -float("inf"), 0, 0
        for epoch in range(settings.local_epochs):
            began = time.perf_counter()
            lr = lr_at(round_ * settings.local_epochs + epoch, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr
            plan = plan_epoch(labels, len(anchor) if anchor else 0, settings, self.site, round_, epoch)
            outcome = steps.run(replace(plan, primary=rows[plan.primary]), optimizer, round_, epoch)
            val_auc, val_loss = self.validation_score()
            value = val_auc if val_auc is not None else -val_loss
            without_gain = 0 if value > best_value else without_gain + 1
            if value >= best_value:  # ties to the later epoch, as the 2025 code
                best, best_value, best_epoch = snapshot(self.model), value, epoch
                moments = copy.deepcopy(optimizer.state_dict()) if settings.keep_moments else None
            epochs.append(
                {
                    "epoch": epoch,
                    "lr": lr,
                    "train_loss": outcome.loss,
                    "val_auc": val_auc,
                    "val_loss": val_loss,
                    "steps": outcome.steps,
                    "skipped": outcome.skipped,
                    "seconds": time.perf_counter() - began,
                }
            )
            self._report(round_, epochs)
            if without_gain >= settings.patience:
                break
        self.model.load_state_dict(best)
        method.round_end(self.model)
        best = snapshot(self.model)
        measured = {
            "val_auc_received": received_auc,
            "val_auc_best": epochs[best_epoch]["val_auc"],
            "best_epoch": best_epoch,
            "train_loss": epochs[best_epoch]["train_loss"],
            "n_train": len(rows),
            "n_validation": len(self.data.splits["validation"]),
            "steps": sum(epoch["steps"] for epoch in epochs),
            **self._diagnose(),
            "seconds": time.perf_counter() - start,
        }
        metrics = {name: float(value) for name, value in measured.items() if value is not None}
        return {"round": round_, "state": best, "metrics": metrics, "epochs": epochs, "moments": moments}

    def _receive(self, shared: Mapping[str, Tensor]) -> None:
        check_shared(shared, self._shared_names, self.model.state_dict(), f"site {self.site}: received model")
        self.method.receive(self.model, shared)

    def _diagnose(self) -> dict[str, float]:
        """The method's diagnostics on one small batch that is the same in every round."""

        def some(feed: Feed, rows: np.ndarray, name: str) -> tuple[Tensor, Tensor]:
            rng = stream(self.method.training.seed, self.site, "diagnostics", name)
            rows = np.sort(rng.permutation(rows)[:DIAGNOSTIC_ITEMS])
            return feed.batch(rows).contiguous(memory_format=torch.channels_last), feed.labels(rows)

        halves = some(self._primary, self.data.splits["train"], "primary")
        if self.method.uses_anchor and self._anchor is not None:
            halves += some(self._anchor, np.arange(len(self._anchor)), "anchor")  # type: ignore[assignment]
        return self.method.diagnostics(self.model, Batch(*halves))

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
                    "val_auc": epochs[-1]["val_auc"],
                    "seconds_per_epoch": sum(epoch["seconds"] for epoch in epochs) / len(epochs),
                }
            )

    # -- scores --------------------------------------------------------------------------------------------------------

    def evaluate(self, split: str, shared: Mapping[str, Tensor] | None = None) -> Evaluation:
        """Scores and metrics of a split ("train", "validation", "test"); with `shared`, of that model.

        The own model is afterwards what it was. Raises `UserError` for an unknown split.
        """
        if split not in self.data.splits:
            raise UserError(f"site {self.site}: there is no split '{split}': {nearest(split, self.data.splits)}")
        rows, feeds = self.data.splits[split], (self._primary, self._anchor)
        with self._holding(shared):
            try:
                probabilities = score(self.method, self.model, *feeds, rows, self.device, self.precision)
            except UserError as error:
                raise UserError(f"site {self.site}, {split} split: {error}") from error
        labels, ids = self.data.primary.labels[rows], [self.data.primary.ids[row] for row in rows]
        return Evaluation(probabilities, labels, ids, binary_metrics(labels, probabilities))

    def validation_score(self) -> tuple[float | None, float]:
        """AUC and mean log loss on the validation split. Without an AUC (None: a class is absent) the loss chooses the
        best epoch; without any validation image the last epoch does."""
        result = self.evaluate("validation")
        if result.metrics["auc"] is None and not self._warned:
            self._warned = True
            what = "validation loss" if len(result.labels) else "last epoch"
            log.warning(
                "site %s: the validation split lacks a class, its AUC is undefined; the %s chooses the best snapshot",
                self.site,
                what,
            )
        p = np.clip(result.probabilities, 1e-12, 1 - 1e-12)
        losses = -np.where(result.labels == 1, np.log(p), np.log1p(-p))
        return result.metrics["auc"], float(losses.mean()) if len(losses) else 0.0

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
            raise UserError(
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
        return model.to(self.device, memory_format=torch.channels_last)
