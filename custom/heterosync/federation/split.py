"""Networks that are cut: the server's half, and the place where the messages of all sites meet in every step."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from heterosync import pulse
from heterosync.errors import HeteroSyncError, UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.wire import WirePolicy, payload_bytes
from heterosync.methods.base import Method, Parcel
from heterosync.training.batches import batch_bounds
from heterosync.training.schedule import lr_at
from heterosync.training.steps import Buffers, make_optimizer

#: What a site calls in every step: the number of its message in this round, and the message; returns the answer.
Ask: TypeAlias = Callable[[int, Parcel], Parcel]

_LOOK = 0.2  # seconds between looks at `stopped`


class Tail:
    """The half of a cut network that the server holds and trains, with its optimiser.

    state: the shared tensors. memory: `Method.server_memory`, filled in after each round. It computes on the GPU where
    there is one.
    """

    def __init__(self, method: Method, state: Mapping[str, Tensor], memory: dict[str, Tensor]):
        self.method, self.memory, self.items, self.precision = method, memory, 0, "float32"
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = method.build_model(weights="none").to(self._device, memory_format=torch.channels_last).train()
        self._names = method.shared_names(self.model)
        self._parcels = method.parcels(self.model)
        self._buffers = Buffers(self.model)
        self.model.load_state_dict(dict(state), strict=False)

    def checked_in(self, reports: Mapping[str, Mapping[str, Any]]) -> None:
        """Settle what all sites share: images per epoch, and bfloat16 where every site computes in it.

        Raises `UserError` when a site did not say how many training images it has.
        """
        counts = {site: int(report["counts"].get("train", 0)) for site, report in reports.items()}
        for site in sorted(counts):
            if counts[site] < 2:
                raise UserError(f"site {site}: it has {counts[site]} training images: at least 2 are needed")
        self.items = max(*counts.values(), self.method.training.match_steps)
        self.precision = "bfloat16" if {r["precision"] for r in reports.values()} == {"bfloat16"} else "float32"

    @property
    def steps_per_epoch(self) -> int:
        return len(batch_bounds(self.items, self.method.training.batch_size))

    def start(self, round_: int, state: Mapping[str, Tensor]) -> None:
        """Begin a round from `state`."""
        self._round, self._messages = round_, 0
        self.model.load_state_dict(dict(state), strict=False)
        self._optimizer = make_optimizer(self.model, self.method.training)
        self._recall()
        self._serving = self.method.serve(self.model, self._update, self.precision)
        next(self._serving)

    def answer(self, sent: Mapping[str, Parcel]) -> dict[str, Parcel]:
        """Answer the messages of all sites. Raises `HeteroSyncError` naming a site whose message does not fit."""
        sites, form = sorted(sent), self._parcels[self._messages % len(self._parcels)]
        sizes = {site: self._size(site, sent[site], form) for site in sites}
        if len(set(sizes.values())) > 1:
            raise HeteroSyncError(f"the sites send batches of different sizes in one step: {sizes}")
        if self._messages % len(self._parcels) == 0:
            self._buffers.keep()
            step = self._messages // len(self._parcels)
            settings = self.method.training
            epoch = self._round * settings.local_epochs + step // self.steps_per_epoch
            for group in self._optimizer.param_groups:
                group["lr"] = lr_at(epoch, settings)
        self._messages += 1
        # in this process it may be called from within the backward pass, and the precision, of a site
        with torch.enable_grad(), torch.autocast(self._device.type, enabled=False):
            answers = self._serving.send([sent[site] for site in sites])
        return dict(zip(sites, answers, strict=True))

    def state(self) -> dict[str, Tensor]:
        """The shared tensors as they are now, on the CPU; `memory` is brought up to date."""
        held = self.model.state_dict()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for parameter, moments in self._optimizer.state.items():
            for kind, value in moments.items():
                if f"{kind}.{names[id(parameter)]}" in self.memory:
                    self.memory[f"{kind}.{names[id(parameter)]}"] = value.detach().cpu().clone()
        return {name: held[name].detach().to("cpu", copy=True).contiguous() for name in self._names}

    def _recall(self) -> None:
        """Give the optimiser the moments of the rounds before, where they are kept."""
        for name, parameter in self.model.named_parameters():
            if bool(self.memory.get(f"step.{name}", torch.zeros(()))):
                kept = {kind: self.memory[f"{kind}.{name}"].clone() for kind in ("step", "exp_avg", "exp_avg_sq")}
                self._optimizer.state[parameter] = {kind: value.to(self._device) for kind, value in kept.items()}

    def _update(self, logits: Tensor, by_logits: Tensor) -> bool:
        self._optimizer.zero_grad(set_to_none=True)
        logits.backward(by_logits)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if not bool(torch.isfinite(norm)):
            self._buffers.restore()
            return False
        self._optimizer.step()
        return True

    def _size(self, site: str, parcel: Parcel, form: Mapping[str, Any]) -> int:
        if set(parcel) != set(form):
            raise HeteroSyncError(f"site {site} sent {sorted(parcel)} where {sorted(form)} was due")
        sizes = {len(value) for value in parcel.values()}
        if len(sizes) != 1:
            raise HeteroSyncError(f"site {site} sent tensors of different lengths: {sorted(sizes)}")
        return sizes.pop()


def meet(site: str, method: Method, model: nn.Module, held: int, items: int, ask: Ask | None) -> None:
    """Let the next round of a site with `held` training images run in step with the others: `items` images per epoch,
    each step through `ask`, which gets only what the method says that it sends."""
    if ask is None or items < held:
        raise HeteroSyncError(f"site {site}: {held} training images, the server foresees {items} per epoch")
    method.training = replace(method.training, match_steps=items)
    policy = WirePolicy(method.name, {}, method.parcels(model), method.training.batch_size)
    steps = count()

    def exchange(parcel: Parcel) -> Parcel:
        policy.check_step(parcel)
        pulse.beat()
        return ask(next(steps), parcel)

    method.exchange = exchange


def refuse_own_batches(site: str, method: Method, size: int) -> None:
    """Raises `UserError` when a site's own batch size is not the job's, where the network is cut."""
    common = method.training.batch_size
    if method.split and size != common:
        same = f"method {method.name} needs batches of {common} at every site, as the job says: remove it"
        raise UserError(f"site {site}: site.yaml sets batch_size {size}: {same}")


class Exchange:
    """Where the sites meet, step by step: a call waits until every site has sent its message, then all get answers.

    sites: all that take part. answer: their messages -> their answers; called by the site that comes last. patience:
    seconds that a site waits for the others. `bytes` counts, by site, the tensors that came in.
    """

    def __init__(
        self,
        sites: list[str],
        answer: Callable[[Mapping[str, Parcel]], dict[str, Parcel]],
        patience: float = float("inf"),
    ):
        self._sites, self._answer, self._patience = list(sites), answer, patience
        self._meeting = threading.Condition()
        self._sent: dict[str, Parcel] = {}
        self._answers: dict[str, Parcel] = {}
        self._left: set[str] = set()
        self._step = 0
        self._broken = ""
        self.bytes = dict.fromkeys(sites, 0)

    def ask(self, site: str, step: int, parcel: Parcel) -> Parcel:
        """The answer to a site's message number `step` of the round. Raises `HeteroSyncError` when the steps of the
        sites have come apart: nobody can go on with the round then, and all that wait hear why."""
        end = time.monotonic() + self._patience
        with self._meeting:
            try:
                self._take(site, step, parcel)
                if len(self._sent) == len(self._sites):
                    sent, self._sent = self._sent, {}
                    self._answers = self._answer(sent)
                    self._step += 1
                    self._meeting.notify_all()
            except HeteroSyncError as error:
                self._break(str(error))
                raise
            except BaseException as error:
                self._break(f"the server failed: {type(error).__name__}: {error}")
                raise
            while self._step == step and not self._broken:
                if not self._meeting.wait(_LOOK) and time.monotonic() > end:
                    late = ", ".join(sorted(set(self._sites) - set(self._sent)))
                    self._break(f"nothing came from {late} for {self._patience:g} s")
            if self._broken:
                raise HeteroSyncError(self._broken)
            return self._answers.pop(site)

    def leave(self, site: str) -> None:
        """A site has made all its steps. Those that wait for it would wait for ever."""
        with self._meeting:
            self._left.add(site)
            if self._sent:
                self._break(f"site {site} made fewer steps than {', '.join(sorted(self._sent))}")

    def close(self, why: str) -> None:
        """End the waiting of all."""
        with self._meeting:
            self._break(why)

    def _take(self, site: str, step: int, parcel: Parcel) -> None:
        if self._broken:
            raise HeteroSyncError(self._broken)
        if site not in self.bytes:
            raise HeteroSyncError(f"site {site} takes no part in this round")
        if step != self._step or site in self._sent:
            due = f"message {step} of the round, {self._step} is due"
            raise HeteroSyncError(f"site {site} sent {due}: a trainer that died cannot come back within a round")
        if self._left:
            raise HeteroSyncError(f"site {site} makes more steps than {', '.join(sorted(self._left))}")
        self._sent[site] = parcel
        self.bytes[site] += payload_bytes(parcel)

    def _break(self, why: str) -> None:
        self._broken = self._broken or why
        self._meeting.notify_all()


def together(train: Mapping[str, Callable[[Ask], Contribution]], exchange: Exchange) -> dict[str, Contribution]:
    """Run one round of all sites in this process; each gets the function by which it asks the server.

    Every site has a thread, of which one at a time computes: random generators belong to the process.
    """
    done: dict[str, Contribution] = {}
    failed: dict[str, BaseException] = {}
    turn = threading.Lock()

    def play(site: str) -> None:
        def ask(step: int, parcel: Parcel) -> Parcel:
            turn.release()
            try:
                return exchange.ask(site, step, parcel)
            finally:
                turn.acquire()

        with turn:
            try:
                done[site] = train[site](ask)
                exchange.leave(site)
            except BaseException as error:
                failed[site] = error
                exchange.close(f"site {site} failed: {error}")

    threads = [threading.Thread(target=play, args=(site,), daemon=True) for site in sorted(train)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        exchange.close("stopped")
        for thread in threads:
            thread.join()
        raise
    if failed:  # the first to fail; the others only heard of it
        raise next(iter(failed.values()))
    return {site: done[site] for site in sorted(done)}
