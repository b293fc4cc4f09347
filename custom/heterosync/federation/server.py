"""The server's half of a round: the fusion, then the method's own rule over it, and what that rule remembers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heterosync.errors import HeteroSyncError, UserError
from heterosync.federation.contribution import Contribution
from heterosync.federation.fusion import SCORED, Fusion
from heterosync.federation.modelfile import PREFIX
from heterosync.federation.split import Tail
from heterosync.federation.wire import is_site_name, signature
from heterosync.methods.base import Method

log = logging.getLogger("heterosync")


class Server:
    """Global states from contributions, for every engine alike.

    state: the global state; unless the method says otherwise (`returned_names`), it fixes names, shapes and types of
    what sites may send. memory: what an earlier server of this training remembered (`memory_of`), None at the first
    round. spill: as in `Fusion`. sites: all that take part.

    Raises `UserError` for a memory that is not this method's.
    """

    def __init__(
        self,
        method: Method,
        state: Mapping[str, Any],
        memory: Mapping[str, Tensor] | None = None,
        spill: Path | None = None,
        sites: Sequence[str] = (),
    ):
        self._method, self._sent, self.shares = method, state, bool(state)
        method.tell = log.info
        self.memory = method.server_memory(tuple(sorted(sites)))
        if memory is not None:
            self.memory = self._going_on(memory, sites)
        self.tail = Tail(method, state, self.memory) if method.split else None
        weighting, score = method.weighting, getattr(method.task, SCORED.get(method.weighting, "best"))
        if weighting in method.scalars:
            weighting, score = "metric", weighting
        self.fusion = Fusion(_returned(method, state), weighting, method.name, spill, score, method.scalars)

    def _going_on(self, stored: Mapping[str, Tensor], sites: Sequence[str]) -> dict[str, Tensor]:
        """What an earlier server remembered; of a site that is new, what every site begins with. What was remembered of
        a site that left waits for its return."""

        def kind(name: str) -> str:
            """The prefix alone where a site's name follows it."""
            found = (prefix for prefix in self._method.memory_by_site if name.startswith(prefix))
            return next((prefix for prefix in found if is_site_name(name.removeprefix(prefix))), name)

        shapes = {kind(name): value.shape for name, value in self.memory.items()}
        missing = {name for name in self.memory if kind(name) == name} - stored.keys()
        if missing or any(shapes.get(kind(name)) != value.shape for name, value in stored.items()):
            where, here = f"method {self._method.name} cannot go on from the stored model", ", ".join(sorted(sites))
            why = f"what its server remembers of the rounds before is missing or does not fit the sites {here}"
            raise UserError(f"{where}: {why}: begin a new training, or go on with the sites that began this one")
        return {**self.memory, **stored}

    def start(self, round_: int, sent: Mapping[str, Any]) -> None:
        """Begin a round, for which the sites get the state `sent`."""
        self._sent, self._round = sent, round_
        self.fusion.start(round_)
        if self.tail is not None:
            self.tail.start(round_, sent)

    def accept(self, contribution: Contribution) -> None:
        """As `Fusion.accept`."""
        self.fusion.accept(contribution)

    def for_site(
        self, site: str, state: Mapping[str, Any] | None = None, memory: Mapping[str, Tensor] | None = None
    ) -> dict[str, Any]:
        """What one site is sent of a global state and the memory that belongs to it: by default this round's state, and
        what is remembered now."""
        state, memory = self._sent if state is None else state, self.memory if memory is None else memory
        return self._method.for_site(state, memory, site)

    def result(self) -> dict[str, Any]:
        """The next global state; call it once per round. Raises `UserError` where the method cannot make one."""
        if self._method.individual:
            try:
                with torch.random.fork_rng(devices=[]):
                    state = self._method.fuse(self._sent, self.fusion.answers(), self.memory)
            except UserError as error:
                raise UserError(f"server, round {self._round}: {error}") from error
            self.fusion.drop()
            return self._checked(state)
        fused = self.fusion.result()
        if self.tail is not None:  # trained step by step; what came in last are only scalars
            return self.tail.state()
        state = self._method.combine(self._sent, fused, self.memory, len(self.fusion.contributors))
        if fused.keys() == self._sent.keys():
            return state
        return {name: state.get(name, before) for name, before in self._sent.items()}  # what only comes down stays

    def _checked(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state that a method made by itself. Raises `HeteroSyncError` where it is not what the sites expect."""
        wanted, found = ({name: signature(value) for name, value in held.items()} for held in (self._sent, state))
        wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        if wrong:
            values = f"is {found.get(wrong[0], 'missing')} instead of {wanted.get(wrong[0], 'nothing')}"
            raise HeteroSyncError(f"method {self._method.name}: tensor '{wrong[0]}' of the fused state {values}")
        return state


def _returned(method: Method, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """What sites send: tensors of the global state, or of a model built here."""
    if type(method).returned_names is Method.returned_names:
        return {} if method.split else state
    model = method.build_model(weights="none")
    own = model.state_dict()
    return {name: own[name] for name in method.returned_names(model)}


def assets_of(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a server remembers, as it stands among the assets of a model file."""
    return {PREFIX + name: value for name, value in memory.items()}


def memory_of(assets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a server remembered, out of the assets of a model file."""
    return {name.removeprefix(PREFIX): value for name, value in assets.items() if name.startswith(PREFIX)}
